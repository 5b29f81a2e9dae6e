"""What the documentation tells people to type exists, and what it links to is there."""

import ast
import json
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from typing import get_args

import click
import pytest
import yaml
from kedro.config import OmegaConfigLoader
from kedro.framework.project import find_pipelines
from kedro.framework.startup import bootstrap_project

from docs.blocks import PAGES, PROJECT, anchors, blocks, links
from qwen_vl_lora.console import split_params
from qwen_vl_lora.parameters import validate_parameters
from qwen_vl_lora.samples.records import Reason
from qwen_vl_lora.settings import CONFIG_LOADER_ARGS

MARKS = {"", "gpu", "hub", "other"}
SHELL = {"source", "pip", "python", "python3", "git", "cd", "export", "docker", "scp", "open", "pre-commit", "uv"}
"""Programs whose commands are not ours to check."""

SHELL_BLOCKS = [block for block in blocks("bash", "sh", "shell", "console") if block.mark != "other"]
COMMANDS = [
    pytest.param(command, id=f"{block.id} {command[:50]}") for block in SHELL_BLOCKS for command in block.commands
]
CHEAP = re.compile(r"kedro (registry|catalog|info)\b|qwen-vl-lora .*--help\b|make help\b")


@pytest.fixture(scope="module")
def pipelines():
    bootstrap_project(PROJECT)
    return {"__default__", *find_pipelines(raise_errors=True)}


@pytest.fixture
def project(tmp_path):
    """Configuration without data, to run cheap commands in."""
    shutil.copytree(PROJECT / "conf", tmp_path / "conf")
    for name in ("pyproject.toml", ".telemetry", "Makefile"):
        shutil.copy(PROJECT / name, tmp_path)
    (tmp_path / "src").mkdir()
    return tmp_path


@pytest.mark.parametrize("block", list(blocks("bash", "sh", "shell", "console")), ids=lambda block: block.id)
def test_a_fence_says_in_a_known_word_what_its_commands_need(block):
    assert block.mark in MARKS


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_names_what_exists(command, pipelines):
    for part in re.split(r"\s*(?:&&|\|\||\||;)\s*", re.sub(r"\s\d?>+\s*\S+", "", command)):
        words = [word for word in shlex.split(part) if not re.fullmatch(r"[A-Z_]+=\S*", word)]
        if words:
            _check(words, pipelines)


def _check(words, pipelines):
    program, *arguments = words
    if program.startswith(".venv/bin/"):
        program = program.removeprefix(".venv/bin/")
    if program == "make":
        targets = set(re.findall(r"^([a-z-]+):", (PROJECT / "Makefile").read_text(), re.MULTILINE))
        assert {word for word in arguments if "=" not in word and not word.startswith("-")} <= targets
    elif program == "qwen-vl-lora":
        from qwen_vl_lora.cli import cli

        _parse(cli, program, arguments)
    elif program == "kedro":
        _check_kedro(arguments, pipelines)
    else:
        assert program in SHELL or program.startswith(("./", "$")), f"{program}: not known; mark the block `bash other`"


def _check_kedro(arguments, pipelines):
    if arguments[:1] == ["run"]:
        from qwen_vl_lora.cli import cli

        options = _parse(cli, "kedro", arguments).params
        assert {*(options["pipelines"] or ()), *filter(None, [options["pipeline"]])} <= pipelines
        _check_parameters(options["env"], options["params"])
        return
    from kedro.framework.cli.cli import KedroCLI

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a plugin whose import warns would be left out
        _parse(KedroCLI(PROJECT), "kedro", arguments)


def _parse(command, name, arguments):
    """The context of the innermost command; click says what it does not know."""
    context = command.make_context(name, list(arguments), resilient_parsing="--help" in arguments or "-h" in arguments)
    rest = [*context._protected_args, *context.args] if hasattr(context, "_protected_args") else context.args
    if not isinstance(command, click.Group) or not rest:
        return context
    inner_name, inner, inner_arguments = command.resolve_command(context, rest)
    return _parse(inner, inner_name, inner_arguments)


def _check_parameters(env, given):
    if not isinstance(given, dict):
        given = split_params(click.Context(click.Command("run")), click.Option(["--params"]), given or "")
    loader = OmegaConfigLoader(str(PROJECT / "conf"), env=env or "local", runtime_params=given, **CONFIG_LOADER_ARGS)
    assert env is None or (PROJECT / "conf" / env).is_dir(), f"no recipe {env}"
    validate_parameters(dict(loader["parameters"]))
    assert loader["catalog"]


CHEAP_COMMANDS = sorted({command for block in SHELL_BLOCKS for command in block.commands if CHEAP.match(command)})


@pytest.mark.parametrize("command", CHEAP_COMMANDS)
def test_cheap_commands_run(command, project):
    program, *arguments = shlex.split(command)
    module = {"kedro": "kedro", "qwen-vl-lora": "qwen_vl_lora"}.get(program)
    line = [sys.executable, "-m", module, *arguments] if module else [program, *arguments]
    done = subprocess.run(line, cwd=project, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("block", list(blocks("python", "yaml", "json", "csv")), ids=lambda block: block.id)
def test_code_that_is_shown_is_code(block):
    if block.language == "python":
        ast.parse(block.text)
    elif block.language == "yaml":
        yaml.safe_load(block.text)
    elif block.language == "json":
        try:
            json.loads(block.text)
        except json.JSONDecodeError:
            [json.loads(line) for line in block.text.splitlines()]  # JSON Lines


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(PROJECT)))
def test_links_lead_somewhere(page):
    for target in links(page):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(file), f"{page.name} links to {target}"


def _texts_of_source():
    """All texts of the package's code, f-strings with `…` for their values, in one line each."""
    for path in sorted((PROJECT / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value
            elif isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)


def _rows(heading, until):
    text = (PROJECT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    section = text.partition(f"{heading}\n")[2].partition(f"\n{until}")[0]
    return [line.split(" | ")[0].removeprefix("| ") for line in section.splitlines() if line.startswith("| `")]


def test_every_message_of_the_troubleshooting_page_is_one_that_the_code_says():
    spoken = "\n".join(_texts_of_source())
    text = (PROJECT / "docs" / "troubleshooting.md").read_text(encoding="utf-8").partition("## Kedro's own messages")[0]
    reasons = set(get_args(Reason))
    unknown = []
    for cell in re.findall(r"^\| (`.*?) \|", text, re.MULTILINE):
        for message in re.findall(r"``\s(.*?)\s``|`([^`]+)`", cell):
            pieces = [piece.strip() for piece in "".join(message).split("…")]
            unknown += [piece for piece in pieces if len(piece) > 5 and piece not in spoken and piece not in reasons]
    assert not unknown, unknown


def test_every_reason_of_a_rejection_is_explained():
    rows = _rows("### Reasons in `rejected_samples`, `left_out_samples` and `captions.csv`", "## ")
    assert [row.strip("`") for row in rows] == list(get_args(Reason))


def test_the_folders_of_data_are_those_of_the_catalog():
    catalog = (PROJECT / "conf" / "base" / "catalog.yml").read_text(encoding="utf-8")
    page = (PROJECT / "data" / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"data/(\d\d_\w+)/", catalog)) <= set(re.findall(r"`(\d\d_\w+)`", page))


def test_both_readmes_tell_the_same():
    english, chinese = PROJECT / "README.md", PROJECT / "README.zh-CN.md"
    commands = [
        [command for block in blocks("bash") if block.page == page for command in block.commands]
        for page in (english, chinese)
    ]
    assert commands[0] == commands[1]
