"""`kedro run` of this project, and the `qwen-vl-lora` command."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import click
from kedro.framework.cli.project import run as kedro_run

from qwen_vl_lora.console import show_messages_for_expected_errors, split_params
from qwen_vl_lora.exceptions import ParameterError

COMMANDS = ("caption", "features", "plan", "prune", "report", "runs", "verify", "viz", "worker")
"""Names of the modules in `commands/`; each has a click command of its own name."""


class LazyCommands(click.Group):
    """Imports a command's module when it is called, so that `kedro` starts as fast as ever."""

    def list_commands(self, context: click.Context) -> list[str]:
        return sorted({*super().list_commands(context), *COMMANDS})

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name in COMMANDS:
            module = importlib.import_module(f"qwen_vl_lora.commands.{name}")
            command: click.Command = getattr(module, name)
            return command
        return super().get_command(context, name)


@click.group(name="qwen-vl-lora", cls=LazyCommands, context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """LoRA fine-tuning of Qwen2-VL and Qwen2.5-VL on image captions."""


def _run(verbose: bool, **options: Any) -> Any:
    if not verbose:
        show_messages_for_expected_errors()
    if options["pipeline"]:  # the same as --pipelines, which Kedro prefers and warns for
        options["pipelines"] = [*options["pipelines"], options.pop("pipeline")]
        options["pipeline"] = None
    _check_runner(click.get_current_context(), options["runner"])
    assert kedro_run.callback is not None
    return kedro_run.callback(**options)


def _check_runner(context: click.Context, runner: str | None) -> None:
    """A `--config` file may come from elsewhere: it must not name a class to import."""
    from_file = context.get_parameter_source("runner") == click.core.ParameterSource.DEFAULT_MAP
    if from_file and runner and "." in runner:
        raise ParameterError(
            f"The --config file names the runner {runner!r}; only Kedro's own are taken from a file. "
            "Name it on the command line if you trust it: --runner."
        )


def _options() -> list[click.Parameter]:
    """Kedro's own options, with our reading of `--params`."""
    options = [copy.copy(option) for option in kedro_run.params]
    for option in options:
        if option.name == "params":
            option.callback = split_params
    return options


_VERBOSE = click.Option(["--verbose", "-v"], is_flag=True, help="Show the traceback of expected errors too.")
cli.add_command(click.Command("run", params=[*_options(), _VERBOSE], callback=_run, help=kedro_run.help))


def main() -> None:
    """Entry point of `qwen-vl-lora`, from the folder of a project."""
    from pathlib import Path

    from kedro.framework.startup import bootstrap_project
    from kedro.utils import find_kedro_project

    project = find_kedro_project(Path.cwd())
    if project is None:
        raise SystemExit("qwen-vl-lora works inside the project folder (the one with pyproject.toml and conf/).")
    bootstrap_project(project)
    show_messages_for_expected_errors()
    cli()
