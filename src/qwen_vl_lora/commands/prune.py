"""`qwen-vl-lora prune`: list, then remove, what no kept run needs."""

from __future__ import annotations

from pathlib import Path

import click

from qwen_vl_lora.commands import completion
from qwen_vl_lora.names import check_name
from qwen_vl_lora.runs.artifacts import relative
from qwen_vl_lora.runs.pruning import plan_removals, recipes, runs_under_way
from qwen_vl_lora.runs.records import find_record, read_records, runs_folder
from qwen_vl_lora.session.console import project_folder, say


@click.command()
@click.option("--recipe", shell_complete=completion.recipes, help="Only this recipe's data.")
@click.option(
    "--keep", default=3, show_default=True, type=click.IntRange(min=1), help="Number of newest adapters to keep."
)
@click.option(
    "--keep-run",
    multiple=True,
    metavar="RUN",
    shell_complete=completion.runs,
    help="Also keep the versions of this run.",
)
@click.option("--yes", is_flag=True, help="Remove. Without this option, only list what would be removed.")
def prune(recipe: str | None, keep: int, keep_run: tuple[str, ...], yes: bool) -> None:
    """Remove old versions, checkpoints and stored features.

    Everything that the record of a kept adapter names is kept too. Run records are never removed.
    """
    project = project_folder()
    kept_runs = [find_record(project, run).id for run in keep_run]
    places = {name: places_of(project, name) for name in recipes(project)}
    for name in [check_name("--recipe", recipe)] if recipe is not None else recipes(project):
        if _is_busy(project, name):
            continue
        removals = plan_removals(project, name, places, keep, kept_runs)
        if yes and _is_busy(project, name):  # one began meanwhile
            continue
        for removal in removals:
            what = f"{relative(removal.path, project)}: {removal.reason}, {removal.bytes / 2**20:.1f} MiB"
            say(f"{'removed' if yes else 'would remove'} {what}")
            if yes:
                removal.carry_out()
        total = sum(removal.bytes for removal in removals) / 2**20
        say(f"{name}: {len(removals)} removals, {total:.1f} MiB")
    if not yes:
        say("Nothing was removed. Add --yes to remove.")


def places_of(project: Path, recipe: str) -> dict[str, Path]:
    """Where the recipe's artifacts lie: by the catalog of the environment that its newest run took."""
    from kedro.framework.project import settings

    from qwen_vl_lora.datasets.workspace import places_in

    conf = project / settings.CONF_SOURCE
    envs = [record.facts.get("env") for record in read_records(runs_folder(project, recipe))[-1:]]
    env = next((env for env in envs if env and (conf / env).is_dir()), None)
    loader = settings.CONFIG_LOADER_CLASS(
        conf_source=str(conf), env=env, runtime_params={"recipe": recipe}, **settings.CONFIG_LOADER_ARGS
    )
    return places_in(loader["catalog"].get, project)


def _is_busy(project: Path, recipe: str) -> bool:
    """Whether a run of the recipe is still running; prints a line if so."""
    busy = runs_under_way(project, recipe)
    if busy:
        say(f"{recipe}: run {busy[0]} is still running; nothing is removed. Repeat the command when it has ended.")
    return bool(busy)
