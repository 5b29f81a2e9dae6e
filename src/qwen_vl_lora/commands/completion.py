"""What a shell completes: recipes, runs and adapter versions that are there."""

from __future__ import annotations

from collections.abc import Iterator

import click
from click.shell_completion import CompletionItem

from qwen_vl_lora.session.console import project_folder


def environments(_context: click.Context, _parameter: click.Parameter, begun: str) -> list[CompletionItem]:
    """Complete `--env`: the folders of conf/ that are no part of Kedro's own set-up."""
    from kedro.framework.project import settings

    folders = sorted((project_folder() / settings.CONF_SOURCE).iterdir())
    names = [path.name for path in folders if path.is_dir() and path.name not in ("base", "local")]
    return [CompletionItem(name) for name in names if name.startswith(begun)]


def recipes(_context: click.Context, _parameter: click.Parameter, begun: str) -> list[CompletionItem]:
    """Complete `--recipe`: recipes with runs."""
    from qwen_vl_lora.runs.pruning import recipes as recorded

    return [CompletionItem(name) for name in recorded(project_folder()) if name.startswith(begun)]


def runs(_context: click.Context, _parameter: click.Parameter, begun: str) -> list[CompletionItem]:
    """Complete a run: `latest`, and ids with recipe and outcome, the newest first."""
    return [item for item in (CompletionItem("latest"), *_runs()) if item.value.startswith(begun)]


def adapters(_context: click.Context, _parameter: click.Parameter, begun: str) -> list[CompletionItem]:
    """Complete `--adapter`: `best`, `none`, and versions with their recipe, the newest first."""
    named = (CompletionItem("best"), CompletionItem("none"))
    return [item for item in (*named, *_runs(wrote="adapter")) if item.value.startswith(begun)]


def _runs(wrote: str | None = None) -> Iterator[CompletionItem]:
    from qwen_vl_lora.runs.records import all_records

    for record in reversed(all_records(project_folder())):
        if wrote is None or wrote in record.complete_versions():
            yield CompletionItem(record.id, help=f"{record.recipe}, {record.outcome}")
