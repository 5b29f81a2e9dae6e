"""`qwen-vl-lora runs`: what was run, and several runs side by side."""

from __future__ import annotations

from collections.abc import Sequence

import click
from rich.console import Console
from rich.table import Table

from qwen_vl_lora.console import project_folder
from qwen_vl_lora.lineage.listing import differing_keys, metrics_of, setting
from qwen_vl_lora.lineage.pruning import recipes
from qwen_vl_lora.lineage.records import Record, find_record, read_records, runs_folder

_MOST_SETTINGS = 6


@click.command()
@click.argument("ids", nargs=-1, metavar="[RUN]...")
@click.option("--recipe", help="Only the runs of this recipe.")
def runs(ids: tuple[str, ...], recipe: str | None) -> None:
    """List all runs, or compare those that are named (an id, a run's folder, or `latest`) in one table."""
    project = project_folder()
    console = Console(width=None if Console().is_terminal else 200, markup=False)
    if ids:
        console.print(_compared([find_record(project, run) for run in ids]))
        return
    names = [recipe] if recipe else recipes(project)
    records = [record for name in names for record in read_records(runs_folder(project, name))]
    if not records:
        click.echo("No run is recorded yet. `kedro run` makes one.")
        return
    console.print(_listed(records))


def _listed(records: Sequence[Record]) -> Table:
    """One line for each run."""
    keys = differing_keys(records)
    shown = keys[:_MOST_SETTINGS]
    table = Table(
        caption=f"{len(keys) - len(shown)} more settings differ: name runs to see all." if shown != keys else None
    )
    for column in ("run", "recipe", "pipelines", "outcome", *shown, "metrics"):
        table.add_column(column, overflow="fold")
    for record in records:
        metrics = ", ".join(f"{name} {value:.4g}" for name, value in metrics_of(record).items())
        pipelines = ", ".join(record.facts.get("pipelines", []))
        settings = [setting(record, key) for key in shown]
        table.add_row(record.id, record.recipe, pipelines, record.outcome, *settings, metrics or "–")
    return table


def _compared(records: Sequence[Record]) -> Table:
    """One column for each run."""
    table = Table("", *(record.id for record in records))
    table.add_row("recipe", *(record.recipe for record in records))
    table.add_row("pipelines", *(", ".join(record.facts.get("pipelines", [])) for record in records))
    table.add_row("outcome", *(record.outcome for record in records))
    table.add_row("message", *(str(record.facts.get("message") or "–") for record in records))
    table.add_row("started", *(str(record.facts.get("started", "–")) for record in records), end_section=True)
    for key in differing_keys(records):
        table.add_row(key, *(setting(record, key) for record in records))
    table.add_section()
    measured = [metrics_of(record) for record in records]
    for name in dict.fromkeys(name for metrics in measured for name in metrics):
        table.add_row(name, *(f"{metrics[name]:.4g}" if name in metrics else "–" for metrics in measured))
    return table
