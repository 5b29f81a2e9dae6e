"""`qwen-vl-lora runs`: list runs, or compare several."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
from rich.cells import cell_len
from rich.table import Table

from qwen_vl_lora.commands import completion
from qwen_vl_lora.exceptions import MissingArtifactError
from qwen_vl_lora.names import check_name
from qwen_vl_lora.parameter_groups import nearest
from qwen_vl_lora.runs.listing import changes, differing_keys, metrics_of, setting
from qwen_vl_lora.runs.pruning import recipes
from qwen_vl_lora.runs.records import Record, all_records, find_record
from qwen_vl_lora.session.console import project_folder, say, terminal

MOST_CHANGES = 3
"""Parameters that the list shows for a run; naming the run shows all."""

_COLUMNS = ("run", "age", "recipe", "pipelines", "outcome", "CIDEr", "changed")


@click.command()
@click.argument("ids", nargs=-1, metavar="[RUN]...", shell_complete=completion.runs)
@click.option("--recipe", shell_complete=completion.recipes, help="Only the runs of this recipe.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def runs(ids: tuple[str, ...], recipe: str | None, as_json: bool) -> None:
    """List all runs, oldest first, or compare the named ones (id, run folder, or `latest`) in one table.

    The list has one line for each run; `changed` lists parameters that differ from the previous run of its recipe.
    """
    project = project_folder()
    records = _of_recipe(project, recipe)
    before = _previous(records)
    chosen = [find_record(project, run) for run in ids] or records
    if as_json:
        say(json.dumps([_facts(record, before.get(record.id)) for record in chosen], indent=1, ensure_ascii=False))
    elif ids:
        terminal(piped_width=200).print(_compared(chosen))
    elif not records:
        say("No run is recorded yet. `kedro run` makes one.")
    else:
        for line in _lines([_COLUMNS, *(_cells(record, before.get(record.id)) for record in records)]):
            say(line)


def _of_recipe(project: Path, recipe: str | None) -> list[Record]:
    """Return the records of one recipe or of all, oldest first."""
    known = set(recipes(project))
    if recipe is not None and check_name("--recipe", recipe) not in known:
        raise MissingArtifactError(
            f"No run of recipe {recipe!r} is recorded{nearest(recipe, known)}. "
            f"Recipes with runs: {', '.join(sorted(known)) or 'none'}."
        )
    return [record for record in all_records(project) if recipe in (None, record.recipe)]


def _previous(records: Sequence[Record]) -> dict[str, Record]:
    """Return the id of each run → the run of its recipe before it."""
    latest: dict[str, Record] = {}
    before = {}
    for record in records:
        if record.recipe in latest:
            before[record.id] = latest[record.recipe]
        latest[record.recipe] = record
    return before


def _cells(record: Record, before: Record | None) -> tuple[str, ...]:
    cider = metrics_of(record).get("CIDEr tuned")
    changed = {} if before is None else changes(before, record)
    return (
        record.id,
        _age(record.facts.get("started")),
        record.recipe,
        ", ".join(record.facts.get("pipelines", [])),
        record.outcome,
        "–" if cider is None else f"{cider:.2f}",
        _shortened([f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in changed.items()]),
    )


def _shortened(changed: Sequence[str]) -> str:
    more = len(changed) - MOST_CHANGES
    return ", ".join([*changed[:MOST_CHANGES], *([f"and {more} more"] if more > 0 else [])])


def _age(started: str | None) -> str:
    """Return the time since `started` in its largest unit."""
    try:
        seconds = (dt.datetime.now(dt.UTC) - dt.datetime.fromisoformat(started or "")).total_seconds()
    except (ValueError, TypeError):  # absent, or of another version
        return "–"
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds // size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def _lines(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Align columns. A terminal wraps a long line; nothing is cut."""
    widths = [max(cell_len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [text + " " * (width - cell_len(text)) for text, width in zip(row, widths, strict=True)]
        yield "  ".join(cells).rstrip()


def _facts(record: Record, before: Record | None) -> dict[str, Any]:
    kept = ("pipelines", "env", "started", "ended", "message")
    return {
        "id": record.id,
        "recipe": record.recipe,
        "outcome": record.outcome,
        **{name: record.facts.get(name) for name in kept},
        "metrics": metrics_of(record),
        "changed": {} if before is None else changes(before, record),
        "folder": str(record.folder),
    }


def _compared(records: Sequence[Record]) -> Table:
    """Print one column for each run."""
    table = Table()
    for heading in ("", *(record.id for record in records)):
        table.add_column(heading, overflow="fold")
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
