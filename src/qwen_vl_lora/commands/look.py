"""`qwen-vl-lora look`: preview what data_engineering would make of a file or folder of captions. Writes nothing."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from qwen_vl_lora.commands import completion
from qwen_vl_lora.samples.texts import printable
from qwen_vl_lora.session.console import keep_stdout_for_results, project_folder, say
from qwen_vl_lora.session.given_parameters import split_params

if TYPE_CHECKING:
    from qwen_vl_lora.samples.collection import Collected

EXAMPLES = 3
"""Number of rejected rows to show for each reason."""

MAX_LISTED = 50
"""Number of rejected rows to include in `--json`."""


@click.command()
@click.argument("captions_file", metavar="CAPTIONS")
@click.option("--image-folder", default=None, help="Folder that relative paths of pictures start from.")
@click.option(
    "--env",
    "-e",
    default="own_captions",
    shell_complete=completion.environments,
    help="Recipe (a folder of conf/) whose limits are used.",
)
@click.option("--params", default="", callback=split_params, help="As in `kedro run --params`.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def look(captions_file: str, image_folder: str | None, env: str, params: dict[str, Any], as_json: bool) -> None:
    """Show what data_engineering would keep and reject of CAPTIONS, a file or a folder, and what looks suspicious.

    Texts and pictures are checked as in a run, so a run with the same parameters gives the same result.
    Pictures given by URL are not fetched and count as rejected. Nothing is written.
    """
    keep_stdout_for_results()
    project = project_folder()
    from kedro.framework.session import KedroSession

    from qwen_vl_lora.datasets.sources import CaptionsFileDataset
    from qwen_vl_lora.parameters import validate_parameters
    from qwen_vl_lora.samples.collection import look_over

    given = {"captions_file": captions_file, "image_folder": image_folder}
    asked = {name: value for name, value in given.items() if value is not None}
    with KedroSession.create(env=env, runtime_params={**params, **asked}) as session:
        assert isinstance(session, KedroSession)
        parameters = validate_parameters(dict(session.load_context().params))
    source = CaptionsFileDataset(filepath=captions_file, image_folder=image_folder).load()
    found = look_over(source, project, parameters.captions, parameters.image)
    if as_json:
        say(json.dumps(_facts(found), indent=1, ensure_ascii=False))
        return
    for line in _lines(found, parameters.quarantine.max_share):
        say(line)


def _facts(found: Collected) -> dict[str, Any]:
    examples = found.rejected_samples.to_dict("records")[:MAX_LISTED]
    return {**found.summary, "lengths": _lengths(found), "pictures": _pictures(found), "examples": examples}


def _lines(found: Collected, max_share: float) -> Iterator[str]:
    from qwen_vl_lora.samples.tally import told

    summary = found.summary
    kept, forms = summary["samples"], ", ".join(summary["forms"]) or "none"
    rejected = sum(summary["rejected"].values())
    bad = rejected - summary["rejected"].get("excluded", 0)
    yield f"{summary['rows']} rows: {kept} samples of {len(found.images)} pictures kept, {rejected} rows rejected"
    if not kept or bad > max_share * summary["rows"]:
        share = bad / max(summary["rows"], 1)
        yield f"a run would stop: {share:.1%} of the rows are bad; quarantine.max_share allows {max_share:.1%}"
    yield f"form of the rows: {forms}"
    lengths, sizes = _lengths(found), _pictures(found)
    if lengths:
        spread = "{shortest} to {longest} {unit}, median {median}"
        yield "answers: " + "; ".join(spread.format(unit=unit, **counts) for unit, counts in lengths.items())
    if sizes:
        yield "pictures: {smallest} to {largest} pixels, median {median}".format(**sizes)
    for line in told(summary, "below"):
        yield printable(line, 2000)
    shown: Counter[str] = Counter()
    for bad in found.rejected_samples.to_dict("records"):
        shown[bad["reason"]] += 1
        if shown[bad["reason"]] <= EXAMPLES:
            yield printable(f"  row {bad['row']}: {bad['reason']}: {bad['detail']}", 400)


def _lengths(found: Collected) -> dict[str, dict[str, int]]:
    """Lengths of answers in words and in characters, because some languages write no spaces between words."""
    answers = [turn["text"] for sample in found.samples for turn in sample["turns"] if turn["role"] == "assistant"]
    if not answers:
        return {}
    return {
        "words": _spread([len(text.split()) for text in answers]),
        "characters": _spread([len(text) for text in answers]),
    }


def _spread(numbers: list[int]) -> dict[str, int]:
    ordered = sorted(numbers)
    return {"shortest": ordered[0], "median": ordered[len(ordered) // 2], "longest": ordered[-1]}


def _pictures(found: Collected) -> dict[str, str]:
    sizes = sorted(((entry.width, entry.height) for entry in found.images), key=lambda size: size[0] * size[1])
    if not sizes:
        return {}
    named = [f"{width}x{height}" for width, height in (sizes[0], sizes[len(sizes) // 2], sizes[-1])]
    return dict(zip(("smallest", "median", "largest"), named, strict=True))
