"""The `qwen-vl-lora` group: its version, nearest names, `--verbose`, completion and exit codes."""

import json
import logging
import signal
import sys
from pathlib import Path

import click
import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner
from kedro.framework.startup import bootstrap_project
from rich.logging import RichHandler

from qwen_vl_lora import __version__
from qwen_vl_lora.cli import COMMANDS, cli
from qwen_vl_lora.exceptions import ParameterError
from qwen_vl_lora.runs.records import runs_folder
from qwen_vl_lora.runs.run import RunInterruptedError
from qwen_vl_lora.session import console
from qwen_vl_lora.training.interruption import SaveOnSignal

PROJECT = Path(__file__).parents[1]


def call(*arguments):
    return CliRunner().invoke(cli, arguments)


def test_it_says_its_version():
    assert __version__ in call("--version").output


def test_a_mistyped_command_is_named_with_the_nearest():
    done = call("captoin", "a.jpg")
    assert done.exit_code == 2
    assert "No such command 'captoin'; nearest: caption. Commands: caption, features" in done.output


@pytest.mark.parametrize(
    "path", [*((name,) for name in COMMANDS), ("features", "show"), ("features", "prune"), ("run",)]
)
def test_every_command_shows_tracebacks_when_asked(path):
    assert "--verbose" in call(*path, "--help").output


@pytest.fixture
def _own_hook(monkeypatch):
    monkeypatch.setattr(sys, "excepthook", lambda *_: None)


@pytest.mark.usefixtures("_own_hook")
def test_verbose_gives_errors_back_to_python(monkeypatch):
    before = sys.excepthook
    console.show_messages_for_expected_errors()
    assert sys.excepthook is not before
    call("features", "--verbose", "show")
    assert sys.excepthook is before


def _stopped():
    """The error of a training that Ctrl-C stopped."""
    watched = SaveOnSignal()
    watched._agreed = signal.SIGINT
    with pytest.raises(RunInterruptedError) as stopped:
        watched.stop_if_asked(5, 8, Path("checkpoints"))
    return stopped.value


@pytest.mark.usefixtures("_own_hook")
@pytest.mark.parametrize(
    ("error", "code"), [(_stopped(), 130), (RunInterruptedError("again"), 1), (ParameterError("wrong"), 1)]
)
def test_an_expected_error_ends_with_its_exit_code(capsys, error, code):
    console.show_messages_for_expected_errors()
    with pytest.raises(SystemExit) as ended:
        sys.excepthook(type(error), error, None)
    assert ended.value.code == code
    assert f"Error: {error}" in capsys.readouterr().err


def test_ctrl_c_ends_a_command_with_130_and_a_sentence(monkeypatch):
    @click.command()
    def runs():
        raise KeyboardInterrupt

    monkeypatch.setattr("qwen_vl_lora.commands.runs.runs", runs)
    done = call("runs")
    assert done.exit_code == 130
    assert "Interrupted. Finished work is kept" in done.output


@pytest.mark.parametrize(
    "said", ["No nodes ran. Repeat the previous command", "There are 3 nodes that have not run.\nYou"]
)
def test_kedros_advice_after_a_failure_is_not_printed(caplog, said):
    console.show_messages_for_expected_errors()
    logging.getLogger("kedro.runner.sequential_runner").warning(said)
    assert said not in caplog.text


def test_a_long_path_in_a_log_line_is_not_broken(monkeypatch, capsys):
    handlers = [RichHandler(rich_tracebacks=True)]
    monkeypatch.setattr(logging.getLogger(), "handlers", handlers)
    console.prepare_terminal()
    path = "data/08_reporting/" + "a-name/" * 30 + "page.html"
    logging.getLogger("qwen_vl_lora.x").warning("Resuming from %s of 一滴水", path)
    assert f"Resuming from {path} of 一滴水\n" in "".join(capsys.readouterr())


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with one recorded run that wrote an adapter."""
    bootstrap_project(PROJECT)
    (tmp_path / "conf" / "own_captions").mkdir(parents=True)
    (tmp_path / "conf" / "base").mkdir()
    folder = runs_folder(tmp_path, "tiny") / "r1"
    folder.mkdir(parents=True)
    written = {"adapter": {"version": "r1", "path": "data/06_models/tiny/adapter/r1/adapter"}}
    facts = {"format": 1, "id": "r1", "recipe": "tiny", "outcome": "finished"}
    (folder / "record.json").write_text(json.dumps(facts | {"datasets": {"read": {}, "written": written}}))
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize(
    ("typed", "begun", "completed"),
    [
        (["verify"], "", ["latest", "r1"]),
        (["report", "r1"], "r", ["r1"]),
        (["runs", "--recipe"], "", ["tiny"]),
        (["prune", "--recipe"], "t", ["tiny"]),
        (["caption", "--adapter"], "", ["best", "none", "r1"]),
        (["plan", "--env"], "", ["own_captions"]),
        (["cap"], "cap", ["caption"]),
    ],
)
def test_a_shell_completes_runs_versions_and_recipes(typed, begun, completed):
    words = typed if typed[-1] != begun else typed[:-1]
    items = ShellComplete(cli, {}, "qwen-vl-lora", "_COMPLETE").get_completions(words, begun)
    assert [item.value for item in items] == completed
