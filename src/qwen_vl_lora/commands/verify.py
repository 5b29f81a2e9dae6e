"""`qwen-vl-lora verify`: whether a run's artifacts are still what they were, and what tells two runs apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from qwen_vl_lora.console import project_folder
from qwen_vl_lora.exceptions import MissingArtifactError
from qwen_vl_lora.lineage.comparison import Differences, compare_runs, compare_with_disk, differing_settings
from qwen_vl_lora.lineage.masking import mask_tree
from qwen_vl_lora.lineage.records import Record, find_record
from qwen_vl_lora.lineage.replay import check_foreign_configuration, comparable_catalog, stored_catalog
from qwen_vl_lora.lineage.surroundings import describe_surroundings


@click.command()
@click.argument("run")
@click.argument("other", required=False)
@click.pass_context
def verify(context: click.Context, run: str, other: str | None) -> None:
    """Compare RUN's record with the artifacts and parameters as they are now, or two runs with each other.

    A run is named by its id, its folder, or `latest`. Ends with code 1 if an artifact or parameter differs.
    Other versions, threads or machines are shown, but are no difference by themselves.
    """
    project = project_folder()
    record = find_record(project, run)
    if other is not None:
        second = find_record(project, other)
        click.echo(f"{record.id} ({record.outcome}) → {second.id} ({second.outcome})")
        differences = compare_runs(record, second, project)
    else:
        click.echo(f"{record.id} ({record.outcome}) → as it is now")
        parameters, catalog = configuration_now(record, project)
        differences = compare_with_disk(record, project, parameters, surroundings_now(record, project))
        if (stored := stored_catalog(record)) is not None:
            differences.parameters.extend(differing_settings({"catalog": stored}, {"catalog": catalog}))
    _show(differences)
    if differences.are_there:
        context.exit(1)


def _show(differences: Differences) -> None:
    _show_list("artifact", differences.artifacts)
    _show_list("parameter", differences.parameters)
    found = differences.surroundings
    click.echo("\n  ".join(["surroundings that differ:", *found]) if found else "surroundings: the same")


def _show_list(what: str, found: Sequence[str]) -> None:
    if not found:
        click.echo(f"{what}s: the same")
        return
    click.echo(f"first {what} that differs: {found[0]}")
    if len(found) > 1:
        click.echo(f"{what}s that differ after it:\n  " + "\n  ".join(found[1:]))


def configuration_now(record: Record, project: Path) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Parameters and catalog that the run's command would resolve to now, without secrets as they are stored.

    Raises:
        MissingArtifactError: if the run's configuration folder or environment is gone.
    """
    from kedro.framework.project import settings

    own = project / settings.CONF_SOURCE
    source, env = project / record.facts["configuration"], record.facts.get("env")
    if not source.is_dir() or (env is not None and env not in {path.name for path in source.iterdir()}):
        raise MissingArtifactError(
            f"Run {record.id} took its parameters from {source} (environment {env or 'local'}), which is not there."
        )
    if source.resolve() != own.resolve():
        check_foreign_configuration(source, own)
    loader = settings.CONFIG_LOADER_CLASS(
        conf_source=str(source),
        env=env,
        runtime_params=dict(record.facts.get("runtime_params", {})),
        **settings.CONFIG_LOADER_ARGS,
    )
    return mask_tree(dict(loader["parameters"])), comparable_catalog(loader["catalog"])


def surroundings_now(record: Record, project: Path) -> Mapping[str, Any]:
    """As far as the run knew them: torch is imported only to compare threads and device."""
    if record.facts.get("threads") is not None:
        import torch  # noqa: F401
    return describe_surroundings(project, record.facts["parameters"].get("device", "auto"))
