"""`qwen-vl-lora prune`: remove what no kept run needs; shows it first."""

from __future__ import annotations

from pathlib import Path

import click

from qwen_vl_lora.console import project_folder
from qwen_vl_lora.lineage.pruning import plan_removals, recipes, runs_under_way
from qwen_vl_lora.lineage.records import find_record


@click.command()
@click.option("--recipe", help="Only this recipe's data.")
@click.option("--keep", default=3, show_default=True, type=click.IntRange(min=1), help="Newest adapters that stay.")
@click.option("--keep-run", multiple=True, metavar="RUN", help="A run whose versions stay as well.")
@click.option("--yes", is_flag=True, help="Remove; without it only what would be removed is shown.")
def prune(recipe: str | None, keep: int, keep_run: tuple[str, ...], yes: bool) -> None:
    """Remove old versions, checkpoints and stored features.

    Kept adapters keep everything that their records name. Run records always stay.
    """
    project = project_folder()
    kept_runs = [find_record(project, run).id for run in keep_run]
    for name in [recipe] if recipe else recipes(project):
        if _is_busy(project, name):
            continue
        removals = plan_removals(project, name, keep, kept_runs)
        if yes and _is_busy(project, name):  # one began meanwhile
            continue
        for removal in removals:
            what = f"{removal.path.relative_to(project)}: {removal.reason}, {removal.bytes / 2**20:.1f} MiB"
            click.echo(f"{'removed' if yes else 'would remove'} {what}")
            if yes:
                removal.carry_out()
        total = sum(removal.bytes for removal in removals) / 2**20
        click.echo(f"{name}: {len(removals)} removals, {total:.1f} MiB")
    if not yes:
        click.echo("Nothing was removed; add --yes to do it.")


def _is_busy(project: Path, recipe: str) -> bool:
    """Whether a run of the recipe is under way; says so."""
    busy = runs_under_way(project, recipe)
    if busy:
        click.echo(f"{recipe}: run {busy[0]} is under way; nothing is removed. Call again when it has ended.")
    return bool(busy)
