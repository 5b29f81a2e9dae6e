"""`qwen-vl-lora report`: the before/after page of several runs side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qwen_vl_lora.console import project_folder
from qwen_vl_lora.exceptions import MissingArtifactError
from qwen_vl_lora.lineage.listing import differing_keys, setting
from qwen_vl_lora.lineage.records import Record, find_record

if TYPE_CHECKING:
    from PIL import Image

    from qwen_vl_lora.scoring.report import ReportRun

DEFAULT_PAGE = Path("data/08_reporting/runs_side_by_side.html")
_SCORED = ("predictions", "caption_metrics", "caption_scores")
_NEEDED = (*_SCORED, "adapter", "images")


@click.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN…")
@click.option(
    "--output",
    "-o",
    type=click.Path(path_type=Path, dir_okay=False),
    default=DEFAULT_PAGE,
    show_default=True,
    help="Where the page is written; an older one is replaced.",
)
def report(runs: tuple[str, ...], output: Path) -> None:
    """Write one page that shows each RUN's captions and metrics side by side.

    A run is named by its id, its folder, or `latest`; it must have gone through evaluation. Pictures and base
    captions are those of the first. What the runs were set to differently stands beside each.
    """
    from qwen_vl_lora.lineage.storage import write_whole
    from qwen_vl_lora.scoring.report import render_report

    project = project_folder()
    output = project / output if output == DEFAULT_PAGE else output
    records = list({record.folder: record for record in (find_record(project, run) for run in runs)}.values())
    versions = [evaluated_versions(record) for record in records]
    catalogs = [_catalog(record, chosen) for record, chosen in zip(records, versions, strict=True)]
    keys = differing_keys(records)
    shown = [_load(catalog, record, keys) for catalog, record in zip(catalogs, records, strict=True)]
    images = catalogs[0]["images"].load()

    def open_image(path: str) -> Image.Image:
        picture: Image.Image = images.open(images.by_path(path).sha256)
        return picture

    output.parent.mkdir(parents=True, exist_ok=True)
    write_whole(output, render_report(shown, open_image))
    click.echo(output)


def evaluated_versions(record: Record) -> dict[str, str]:
    """The versions of what a run's page needs: what it wrote itself, and what it read.

    Raises:
        MissingArtifactError: if the run did not go through evaluation.
    """
    versions = {**record.read_versions(), **record.complete_versions()}
    if not set(_SCORED) <= record.complete_versions().keys():
        raise MissingArtifactError(
            f"Run {record.id} ({', '.join(record.facts.get('pipelines', []))}, {record.outcome}) wrote no predictions "
            "and metrics. Name a run of the evaluation pipeline; `qwen-vl-lora runs` shows which have metrics."
        )
    return {name: versions[name] for name in _NEEDED if name in versions}


def _catalog(record: Record, versions: Mapping[str, str]) -> Any:
    """The catalog of the run's own recipe, each artifact in the run's version."""
    from kedro.framework.session import KedroSession

    with KedroSession.create(env=record.facts.get("env"), runtime_params={"recipe": record.recipe}) as session:
        assert isinstance(session, KedroSession)
        return session.load_context()._get_catalog(load_versions=dict(versions))


def _load(catalog: Any, record: Record, keys: Sequence[str]) -> ReportRun:
    from qwen_vl_lora.scoring.facts import facts_of
    from qwen_vl_lora.scoring.report import ReportRun

    predictions, metrics, scores = (catalog[name].load() for name in _SCORED)
    facts = facts_of(catalog["adapter"].load(), metrics["num_images"])
    differences = {key: setting(record, key) for key in keys}
    facts = replace(facts, name=f"{record.recipe} {record.id}", differences=differences)
    return ReportRun(facts, predictions, scores, metrics)
