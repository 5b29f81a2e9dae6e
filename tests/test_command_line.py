"""`kedro` as people use it: one message for an expected fault, nothing run and nothing written."""

import subprocess
import sys
from pathlib import Path

import click
import pytest

import warm
from qwen_vl_lora.cli import cli

PROJECT = Path(__file__).parents[1]


@pytest.fixture
def kedro(tmp_path):
    """`kedro("run", …)` in a copy of the project's configuration."""
    import shutil

    shutil.copytree(PROJECT / "conf", tmp_path / "conf")
    shutil.copy(PROJECT / "pyproject.toml", tmp_path)
    shutil.copy(PROJECT / ".telemetry", tmp_path)
    (tmp_path / "src").mkdir()
    models = tmp_path / "data" / "06_models"
    models.mkdir(parents=True)
    (models / "tiny_qwen2_vl").symlink_to(PROJECT / "data" / "06_models" / "tiny_qwen2_vl")

    def call(*arguments):
        command = [sys.executable, "-m", "kedro", *arguments]
        return warm.run(command, cwd=tmp_path)

    return call


def artifacts(folder):
    """Files that a run wrote; the linked base is not looked into."""
    return [path for path in (folder / "data").rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--params", "lora.rank=8"], "lora.rank: not a name of LoraConfig; nearest: r"),
        (["--params", "lorra.r=4"], "lorra: unknown key; nearest: lora"),
        (["--params", "lora.r=-1"], "lora.r: Input should be greater than 0; got -1"),
        (["--params", "base_model=no/such/model"], "no/such/model not found"),
        (["--pipeline", "evaluation", "--params", "recipe=none_yet"], "none_yet"),
        (["--env", "own_caption"], "no such environment; nearest: own_captions. Environments: base, "),
        (["--only-missing-outputs"], "--only-missing-outputs is not supported"),
        (["--env", "own_captions"], "captions_file="),
        (["--env", "own_captions", "--params", "captions_file=missing.csv"], "missing.csv"),
        (["--env", "own_captions", "--params", "captions_file=empty.csv"], "empty.csv"),
        (["--env", "own_captions", "--params", "captions_file=lost.csv"], "gone.png"),
    ],
)
def test_an_expected_fault_is_one_message_and_no_node_runs(kedro, tmp_path, arguments, message):
    (tmp_path / "empty.csv").write_text("image_path,caption\n")
    (tmp_path / "lost.csv").write_text("image_path,caption\ngone.png,a dog\n")
    result = kedro("run", *arguments)
    said = result.stdout + result.stderr
    assert result.returncode != 0
    assert message in " ".join(said.split())
    assert "Traceback" not in said
    assert "collect_samples:" not in said
    assert artifacts(tmp_path) == []


@pytest.mark.parametrize(
    ("given", "parameters"),
    [
        ("lora.r=4,device=cpu", {"lora": {"r": 4}, "device": "cpu"}),
        (
            "captions_file=/data/cats, dogs/c.csv,device=cpu",
            {"captions_file": "/data/cats, dogs/c.csv", "device": "cpu"},
        ),
        (
            "image.url_hosts=[a.example,b.example], lora.r =4,",
            {"image": {"url_hosts": ["a.example", "b.example"]}, "lora": {"r": 4}},
        ),
        ("captions_file=a=b/c.csv", {"captions_file": "a=b/c.csv"}),
        (
            "captions_file='/data/a, name=b/c.csv',device=cpu",
            {"captions_file": "/data/a, name=b/c.csv", "device": "cpu"},
        ),
        ('prompt.user="What, x=it\'s?"', {"prompt": {"user": "What, x=it's?"}}),
        ("prompt.user=It's it, recipe=x", {"prompt": {"user": "It's it"}, "recipe": "x"}),
        ("", {}),
    ],
)
def test_a_comma_ends_a_value_only_where_another_name_follows(given, parameters):
    context = cli.commands["run"].make_context("run", ["--params", given])
    assert context.params["params"] == parameters


def test_a_parameter_without_its_value_is_refused():
    with pytest.raises(click.UsageError, match="'device' must be of the form key=value"):
        cli.commands["run"].make_context("run", ["--params", "device"])


def test_a_quote_that_is_not_closed_is_refused():
    with pytest.raises(click.UsageError, match="is not closed"):
        cli.commands["run"].make_context("run", ["--params", "captions_file='/data/a, name=b/c.csv"])


def test_verbose_shows_the_traceback(kedro):
    result = kedro("run", "--verbose", "--params", "lora.r=-1")
    assert result.returncode != 0
    assert "Traceback" in result.stdout + result.stderr


def test_listing_pipelines_and_catalog_does_not_import_torch(tmp_path):
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from kedro.framework.startup import bootstrap_project\n"
        "from kedro.framework.session import KedroSession\n"
        "from kedro.framework.project import pipelines\n"
        f"bootstrap_project(Path({str(PROJECT)!r}))\n"
        f"with KedroSession.create(project_path={str(PROJECT)!r}) as session:\n"
        "    catalog = session.load_context().catalog\n"
        "    names = [name for pipeline in dict(pipelines).values() for name in pipeline.datasets()]\n"
        "    assert len({name for name in names if catalog.get(name) is not None}) > 20\n"
        "heavy = {'torch', 'transformers', 'peft', 'datasets', 'swanlab', 'modelscope'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_listing_pipelines_imports_neither_torch_nor_pandas():
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from kedro.framework.startup import bootstrap_project\n"
        "from kedro.framework.project import pipelines\n"
        f"bootstrap_project(Path({str(PROJECT)!r}))\n"
        "assert len(dict(pipelines)) > 5\n"
        "slow = {'torch', 'transformers', 'peft', 'pandas', 'numpy'} & set(sys.modules)\n"
        "assert not slow, slow\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_a_run_says_what_each_node_does_and_nothing_of_kedros_own_steps(kedro):
    result = kedro("run", "--pipeline", "data_engineering", "--params", "captions.num_rows=90,split.test_images=2")
    said = " ".join((result.stdout + result.stderr).split())
    assert result.returncode == 0, said
    assert "split_conversations: Hold out images, by their bytes, with all their conversations." in said
    assert "Loading data" not in said
    assert len(said) < 1500
