"""What the source may not contain: ways to run, unpickle, import or fetch what somebody else wrote.

Fails as soon as one of them is written, wherever it stands.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import yaml

import qwen_vl_lora
from conftest import PROJECT
from qwen_vl_lora import settings

PACKAGE = Path(qwen_vl_lora.__file__).parent
MODULES = {path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text("utf-8")) for path in PACKAGE.rglob("*.py")}


def calls(name: str) -> list[tuple[str, dict[str, ast.expr]]]:
    """Module and keyword arguments of every call whose dotted name ends so."""
    return [
        (module, {keyword.arg or "**": keyword.value for keyword in node.keywords})
        for module, tree in MODULES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and f".{ast.unparse(node.func)}".endswith(f".{name}")
    ]


def constant(arguments: dict[str, ast.expr], name: str) -> object:
    value = arguments.get(name)
    return value.value if isinstance(value, ast.Constant) else None


def test_torch_load_reads_weights_only():
    assert calls("torch.load")
    assert all(constant(arguments, "weights_only") is True for _, arguments in calls("torch.load"))


def test_numpy_loads_no_pickles():
    assert calls("np.load")
    assert all(constant(arguments, "allow_pickle") is False for _, arguments in calls("np.load"))


@pytest.mark.parametrize(
    "name", ["eval", "exec", "compile", "__import__", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load"]
)
def test_nothing_runs_text(name):
    found = [module for module, _ in calls(name) if name not in ("eval", "compile")]
    if name in ("eval", "compile"):  # model.eval() and re.compile() are something else
        found = [
            module
            for module, tree in MODULES.items()
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name
        ]
    assert found == []


@pytest.mark.parametrize("name", ["pickle", "marshal", "shelve", "dill", "joblib", "cloudpickle", "xml", "telnetlib"])
def test_unsafe_readers_are_not_imported(name):
    imported = {
        (module, alias.name.split(".")[0])
        for module, tree in MODULES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    } | {
        (module, (node.module or "").split(".")[0])
        for module, tree in MODULES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
    }
    assert [module for module, imported_name in imported if imported_name == name] == []


def test_processes_are_started_without_a_shell():
    assert [
        module for name in ("subprocess.run", "subprocess.Popen") for module, a in calls(name) if "shell" in a
    ] == []


def test_modules_are_imported_by_name_only_from_a_fixed_list():
    assert {module for module, _ in calls("import_module")} == {"cli.py"}


def test_code_of_a_model_or_dataset_is_trusted_only_where_the_catalog_says_so():
    trusting = [
        module
        for name in ("from_pretrained", "from_config", "load")
        for module, arguments in calls(name)
        if "trust_remote_code" in arguments and constant(arguments, "trust_remote_code") is not False
    ]
    assert set(trusting) <= {"hub/tables.py"}


def test_adapters_are_loaded_by_one_function():
    assert {module for module, _ in calls("PeftModel.from_pretrained")} == {"model/adapter.py"}


def test_html_is_escaped_by_itself():
    environments = calls("jinja2.Environment")
    assert environments
    assert all(constant(arguments, "autoescape") is True for _, arguments in environments)
    assert "| safe" not in (PACKAGE / "evaluation/report.html").read_text("utf-8")


def test_configuration_reads_no_environment_and_names_no_python():
    assert "custom_resolvers" not in settings.CONFIG_LOADER_ARGS
    for file in (PROJECT / "conf").rglob("*.yml"):
        text = file.read_text("utf-8")
        assert "oc.env" not in text, file
        assert "!!python" not in text, file
        yaml.safe_load(text)
