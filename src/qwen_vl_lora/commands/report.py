"""`qwen-vl-lora report`: one before/after page for several runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qwen_vl_lora.commands import completion
from qwen_vl_lora.exceptions import MissingArtifactError
from qwen_vl_lora.runs.artifacts import relative
from qwen_vl_lora.runs.listing import differing_keys, setting
from qwen_vl_lora.runs.records import REPORTING, Record, find_record
from qwen_vl_lora.session.console import project_folder, say

if TYPE_CHECKING:
    from PIL import Image

    from qwen_vl_lora.evaluation.report import ReportRun
    from qwen_vl_lora.pages.language import Language, Setting

DEFAULT_PAGE = Path(REPORTING, "runs_side_by_side.html")
_SCORED = ("predictions", "caption_metrics", "caption_scores")
_NEEDED = (*_SCORED, "adapter", "images", "caption_statistics")


@click.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN…", shell_complete=completion.runs)
@click.option(
    "--output",
    "-o",
    type=click.Path(path_type=Path, dir_okay=False),
    default=DEFAULT_PAGE,
    show_default=True,
    help="Output file; an existing file is replaced.",
)
@click.option(
    "--language",
    type=click.Choice(["auto", "en", "zh"]),
    default=None,
    help="Language of the page; default: report.language of the first run.",
)
def report(runs: tuple[str, ...], output: Path, language: Setting | None) -> None:
    """Write one page that shows each RUN's captions and metrics side by side.

    Name a run by its id, its folder, or `latest` (the newest with predictions); it must have completed evaluation.
    Pictures and base captions are those of the first run, and each other run must have some of these pictures.
    Parameters that differ are shown beside each run.
    """
    from qwen_vl_lora.evaluation.predictions import language_of_references
    from qwen_vl_lora.evaluation.report import render_report
    from qwen_vl_lora.runs.storage import write_whole

    project = project_folder()
    output = project / output if output == DEFAULT_PAGE else output
    records = list({record.folder: record for record in (_find(project, run) for run in runs)}.values())
    versions = [evaluated_versions(record) for record in records]
    catalogs = [recorded_catalog(record, chosen) for record, chosen in zip(records, versions, strict=True)]
    keys = differing_keys(records)
    read = zip(catalogs, records, versions, strict=True)
    wanted = language or records[0].facts.get("parameters", {}).get("report", {}).get("language", "auto")
    written = language_of_references(wanted, catalogs[0]["predictions"].load())
    shown = [_load(catalog, record, keys, chosen, written) for catalog, record, chosen in read]
    images = catalogs[0]["images"].load()

    def open_image(path: str) -> Image.Image:
        picture: Image.Image = images.open(images.by_path(path).sha256)
        return picture

    output.parent.mkdir(parents=True, exist_ok=True)
    write_whole(output, render_report(shown, open_image, written))
    say(relative(output, Path.cwd()))


def _find(project: Path, run: str) -> Record:
    record = find_record(project, run, _is_evaluated)
    if run == "latest":
        say(f"latest: run {record.id} of recipe {record.recipe}, the newest with predictions", err=True)
    return record


def _is_evaluated(record: Record) -> bool:
    return set(_SCORED) <= record.complete_versions().keys()


def evaluated_versions(record: Record) -> dict[str, str]:
    """Return the versions of the datasets that the page of a run needs: those it wrote and those it read.

    Raises:
        MissingArtifactError: if the run did not complete evaluation.
    """
    versions = {**record.read_versions(), **record.complete_versions()}
    if not _is_evaluated(record):
        raise MissingArtifactError(
            f"Run {record.id} ({', '.join(record.facts.get('pipelines', []))}, {record.outcome}) wrote no predictions "
            "and metrics. Name a run of the evaluation pipeline; `qwen-vl-lora runs` shows which have metrics."
        )
    return {name: versions[name] for name in _NEEDED if name in versions}


def recorded_catalog(record: Record, versions: Mapping[str, str]) -> Any:
    """Return the catalog of the run's recipe with each artifact at the run's version."""
    from kedro.framework.session import KedroSession

    with KedroSession.create(env=record.facts.get("env"), runtime_params={"recipe": record.recipe}) as session:
        assert isinstance(session, KedroSession)
        return session.load_context()._get_catalog(load_versions=dict(versions))


def _load(
    catalog: Any, record: Record, keys: Sequence[str], versions: Mapping[str, str], language: Language
) -> ReportRun:
    from qwen_vl_lora.evaluation.facts import facts_of
    from qwen_vl_lora.evaluation.report import ReportRun

    predictions, metrics, scores = (catalog[name].load() for name in _SCORED)
    statistics = catalog["caption_statistics"].load() if "caption_statistics" in versions else {}
    facts = facts_of(catalog["adapter"].load(), metrics["num_images"], statistics, language)
    differences = {key: setting(record, key) for key in keys}
    facts = replace(facts, name=f"{record.recipe} {record.id}", differences=differences)
    return ReportRun(facts, predictions, scores, metrics)
