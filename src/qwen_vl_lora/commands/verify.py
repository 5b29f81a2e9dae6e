"""`qwen-vl-lora verify`: check a run's artifacts against its record, or show how two runs differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from qwen_vl_lora.commands import completion
from qwen_vl_lora.exceptions import MissingArtifactError
from qwen_vl_lora.runs.comparison import (
    Differences,
    compare_runs,
    compare_with_disk,
    differing_settings,
    in_flow_order,
)
from qwen_vl_lora.runs.foreign import check_permitted, outside_paths, without_interpolations
from qwen_vl_lora.runs.masking import mask_tree
from qwen_vl_lora.runs.records import Record, find_record, in_todays_names, is_of_project
from qwen_vl_lora.runs.replay import check_foreign_configuration, comparable_catalog, stored_catalog
from qwen_vl_lora.runs.surroundings import describe_surroundings
from qwen_vl_lora.session.console import project_folder, say


@click.command()
@click.argument("run", shell_complete=completion.runs)
@click.argument("other", required=False, shell_complete=completion.runs)
@click.option(
    "--allow-path",
    multiple=True,
    metavar="PATH",
    type=click.Path(path_type=Path),
    help="File or folder outside the project that may be read for a record from elsewhere. Repeatable.",
)
@click.pass_context
def verify(context: click.Context, run: str, other: str | None, allow_path: tuple[Path, ...]) -> None:
    """Compare RUN's record with the artifacts and parameters as they are now, or two runs with each other.

    Name a run by its id, its folder, or `latest` (the newest that finished). Exits with code 1 if an artifact or
    parameter differs. Differing packages, threads or machines are shown but do not count as a difference.
    """
    project = project_folder()
    record = find_record(project, run, _is_finished)
    check_paths(record, project, allow_path)
    if other is not None:
        second = find_record(project, other, _is_finished)
        check_paths(second, project, allow_path)
        say(f"{record.id} ({record.outcome}) → {second.id} ({second.outcome})")
        differences = compare_runs(record, second, project)
    else:
        say(f"{record.id} ({record.outcome}) → as it is now")
        parameters, catalog = configuration_now(record, project)
        differences = compare_with_disk(record, project, parameters, describe_surroundings(project, "auto"))
        if (stored := stored_catalog(record)) is not None:
            differences.parameters.extend(differing_settings({"catalog": stored}, {"catalog": catalog}))
    _show(differences)
    if differences.are_there:
        context.exit(1)


def _is_finished(record: Record) -> bool:
    return record.outcome == "finished"


def _show(differences: Differences) -> None:
    _show_list("artifact", differences.artifacts)
    _show_list("parameter", differences.parameters)
    found = differences.surroundings
    say("\n  ".join(["surroundings that differ:", *found]) if found else "surroundings: the same")


def _show_list(what: str, found: Sequence[str]) -> None:
    if not found:
        say(f"{what}s: the same")
        return
    say(f"first {what} that differs: {found[0]}")
    if len(found) > 1:
        say(f"{what}s that differ after it:\n  " + "\n  ".join(found[1:]))


def check_paths(record: Record, project: Path, allowed: Sequence[Path]) -> None:
    """Refuse a record from elsewhere that names files outside the project.

    Raises:
        ParameterError: listing them.
    """
    if is_of_project(record.folder, project):
        return
    paths = {"configuration": str(record.facts.get("configuration", ""))}
    for name, artifact in in_flow_order(record).items():
        place = str(artifact.get("path", ""))
        paths[name] = place
        paths |= {f"{name}: {file}": f"{place}/{file}" for file in artifact.get("files", {})}
    check_permitted(f"The record {record.folder}", outside_paths(paths, project, allowed), [])


def configuration_now(record: Record, project: Path) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Return the parameters and catalog that the run's command would resolve to now, with secrets masked as stored.

    Raises:
        MissingArtifactError: if the run's configuration folder or environment no longer exists.
    """
    from kedro.framework.project import settings

    own = project / settings.CONF_SOURCE
    source, env = project / record.facts.get("configuration", "?"), record.facts.get("env")
    if not source.is_dir() or (env is not None and env not in {path.name for path in source.iterdir()}):
        raise MissingArtifactError(
            f"Run {record.id} took its parameters from {source} (environment {env or 'local'}), which was not found."
        )
    if source.resolve() != own.resolve():
        check_foreign_configuration(source, own, project)
    loader = settings.CONFIG_LOADER_CLASS(
        conf_source=str(source),
        env=env,
        runtime_params=without_interpolations(record.facts.get("runtime_params", {})),
        **settings.CONFIG_LOADER_ARGS,
    )
    return mask_tree(in_todays_names(loader["parameters"])), comparable_catalog(loader["catalog"])
