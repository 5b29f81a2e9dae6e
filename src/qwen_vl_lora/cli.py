"""The `kedro run` of this project, and the `qwen-vl-lora` command."""

from __future__ import annotations

import copy
import importlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from kedro.framework.cli.project import run as kedro_run

from qwen_vl_lora import __version__
from qwen_vl_lora.cluster.here import ignored_variables
from qwen_vl_lora.exceptions import MissingArtifactError, ParameterError
from qwen_vl_lora.parameter_groups import nearest
from qwen_vl_lora.runs.foreign import Permissions, permit
from qwen_vl_lora.session.console import (
    find_project,
    interruptible,
    prepare_terminal,
    project_folder,
    show_messages_for_expected_errors,
    show_tracebacks,
)
from qwen_vl_lora.session.given_parameters import split_params

logger = logging.getLogger(__name__)

COMMANDS = (
    "caption",
    "features",
    "look",
    "plan",
    "playground",
    "prune",
    "push",
    "report",
    "runs",
    "verify",
    "viz",
    "watch",
)
"""Names of the modules in `commands/`. Each holds a click command of the same name."""

OUTSIDE = object()
"""Context of a command in a folder that is neither a project nor holds a `conf/`: only `run` may go on."""

_FAULT = "qwen_vl_lora.fault_of_config_file"
_VERBOSE = "qwen_vl_lora.verbose"


def _show_tracebacks(context: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        context.meta[_VERBOSE] = True  # for `kedro run`, which sets its messages later
        show_tracebacks()


def _verbose() -> click.Option:
    """Return the option that every command has."""
    text = "Show the traceback of expected errors too."
    return click.Option(
        ["--verbose", "-v"], is_flag=True, is_eager=True, expose_value=False, callback=_show_tracebacks, help=text
    )


def _with_verbose(command: click.Command) -> click.Command:
    """Add `--verbose` to a command and, of a group, to those in it."""
    if not any(option.name == "verbose" for option in command.params):
        command.params.append(_verbose())
    for inner in command.commands.values() if isinstance(command, click.Group) else ():
        _with_verbose(inner)
    return command


class LazyCommands(click.Group):
    """Imports the module of a command when it is called, so that `kedro` starts quickly."""

    def parse_args(self, context: click.Context, arguments: list[str]) -> list[str]:
        """Take options of `run` without a command for a run: so Kedro's guides start a packaged project."""
        own = {name for option in self.params for name in option.opts}
        place, first = next(((at, text) for at, text in enumerate(arguments) if text not in own), (0, ""))
        if first.partition("=")[0] in {name for option in run.params for name in option.opts}:
            arguments = [*arguments[:place], "run", *arguments[place:]]
        return super().parse_args(context, arguments)

    def invoke(self, context: click.Context) -> Any:
        with interruptible():
            return super().invoke(context)

    def resolve_command(
        self, context: click.Context, arguments: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if arguments and self.get_command(context, arguments[0]) is None and not context.resilient_parsing:
            known = self.list_commands(context)
            context.fail(
                f"No such command {arguments[0]!r}{nearest(arguments[0], set(known))}. Commands: {', '.join(known)}."
            )
        name, command, rest = super().resolve_command(context, arguments)
        if context.obj is OUTSIDE and command is not run:
            raise SystemExit(
                f"qwen-vl-lora {name} must be called inside a project folder (with pyproject.toml and conf/), or where "
                "a packaged project ran."
            )
        return name, command, rest

    def list_commands(self, context: click.Context) -> list[str]:
        return sorted({*super().list_commands(context), *COMMANDS})

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name in COMMANDS:
            module = importlib.import_module(f"qwen_vl_lora.commands.{name}")
            return _with_verbose(getattr(module, name))
        found = super().get_command(context, name)
        return found if found is None else _with_verbose(found)


@click.group(
    name="qwen-vl-lora",
    cls=LazyCommands,
    params=[_verbose()],
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(__version__, "--version", "-V", prog_name="qwen-vl-lora")
def cli() -> None:
    """LoRA fine-tuning of Qwen2-VL, Qwen2.5-VL, Qwen3-VL and Qwen3.5 on image captions."""


def _run(allow_path: tuple[Path, ...], trust: bool, **options: Any) -> Any:
    prepare_terminal()
    if not click.get_current_context().meta.get(_VERBOSE):
        show_messages_for_expected_errors()
    if fault := click.get_current_context().meta.get(_FAULT):
        raise fault
    if ignored_variables:
        logger.warning(
            "Ignored environment variables: %s. Set `cluster` and `training_args`.", ", ".join(ignored_variables)
        )
    if options["pipeline"]:  # the same as --pipelines, which Kedro prefers and warns for
        options["pipelines"] = [*options["pipelines"], options.pop("pipeline")]
        options["pipeline"] = None
    _check_options(options)
    source = click.get_current_context().get_parameter_source("params")
    from_file = Path(options["config"]) if source == click.core.ParameterSource.DEFAULT_MAP else None
    permit(Permissions(allow_path, trust, from_file))
    assert kedro_run.callback is not None
    with interruptible():
        return kedro_run.callback(**options)


def _check_options(options: Mapping[str, Any]) -> None:
    """Check the options before Kedro creates a session and reads the places that they name."""
    from kedro.framework.project import settings

    from qwen_vl_lora.runs.replay import check_foreign_configuration
    from qwen_vl_lora.session.configuration import check_option_names
    from qwen_vl_lora.session.packaged import is_archive
    from qwen_vl_lora.session.selection import check_selection

    check_option_names(options)
    check_selection(options)
    project, given = project_folder(), options["conf_source"]
    own = project / settings.CONF_SOURCE
    if not own.is_dir():
        _check_that_the_user_named(given, own)
    elif given and not is_archive(given) and Path(given).resolve() != own.resolve():
        check_foreign_configuration(Path(given), own, project)


def _check_that_the_user_named(source: str | None, own: Path) -> None:
    """Check that the configuration of a folder without `conf/` was chosen on the command line: it is trusted."""
    if source is None:
        raise MissingArtifactError(
            f"{own} not found. Expected a project folder, or --conf-source with the configuration of a packaged "
            "project: a folder, or the archive of `kedro package`."
        )
    if click.get_current_context().get_parameter_source("conf_source") == click.core.ParameterSource.DEFAULT_MAP:
        raise ParameterError(
            f"The --config file names conf_source {source}, and there is no {own} to compare it with. A file may not "
            "choose the configuration that is trusted. Name it on the command line: --conf-source."
        )


def _read_config_file(context: click.Context, _: click.Parameter, value: str | None) -> str | None:
    """Read `--config`: options by name in a YAML file, which may come from elsewhere."""
    from qwen_vl_lora.session.configuration import read_run_options

    if value:
        known = {option.name: option for option in _options() if option.name}
        try:
            options = read_run_options(Path(value), known)
        except ParameterError as error:
            context.meta[_FAULT] = error  # raised by the command, which has parsed --verbose
        else:
            context.default_map = {**(context.default_map or {}), **options}
    return value


def _options() -> list[click.Parameter]:
    """Return Kedro's options with this project's parsing of `--params` and `--config`."""
    options = [copy.copy(option) for option in kedro_run.params]
    for option in options:
        if option.name == "params":
            option.callback = split_params
        if option.name == "config":
            option.callback = _read_config_file
    return options


_PERMISSIONS = [
    click.Option(
        ["--allow-path"],
        multiple=True,
        metavar="PATH",
        type=click.Path(path_type=Path),
        help="File or folder outside the project that a configuration from elsewhere may read. Repeatable.",
    ),
    click.Option(
        ["--trust"],
        is_flag=True,
        help="Let a configuration from elsewhere enable what conf/ disables: URLs, folders, trackers' clouds, hubs.",
    ),
]
run = click.Command("run", params=[*_options(), *_PERMISSIONS], callback=_run, help=kedro_run.help)
cli.add_command(run)


def main(*arguments: Any, **options: Any) -> Any:
    """Entry point of `qwen-vl-lora`: inside a project folder, or where a packaged project runs.

    Args:
        arguments, options: of `click.Command.main`, for callers in Python.
    """
    from kedro.framework.project import configure_project
    from kedro.framework.startup import bootstrap_project

    prepare_terminal()
    show_messages_for_expected_errors()
    project = find_project()
    if project is None:
        configure_project(__name__.partition(".")[0])
    else:
        bootstrap_project(project)
    prepare_terminal()  # Kedro has set log handlers and a hook for tracebacks of its own
    show_messages_for_expected_errors()
    is_outside = project is None and not Path("conf").is_dir()
    return cli(*arguments, obj=OUTSIDE if is_outside else None, **options)
