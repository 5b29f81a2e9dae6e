"""`qwen-vl-lora plan`: estimate the cost of a training in seconds, without a GPU."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import TYPE_CHECKING, Any

import click

from qwen_vl_lora.commands import completion
from qwen_vl_lora.faults import shown_bytes
from qwen_vl_lora.session.console import keep_stdout_for_results, say, terminal
from qwen_vl_lora.session.given_parameters import split_params

if TYPE_CHECKING:
    from rich.table import Table

    from qwen_vl_lora.training.plan import Plan, Spread
    from qwen_vl_lora.training.stages import FeatureUse, Within

_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(s|sec|m|min|h|hours?|d|days?)?", re.IGNORECASE)
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:gi?b)?", re.IGNORECASE)


class GpuMemory(click.ParamType):
    """Bytes of a size such as `24GB`. GPU memory is sold in powers of two, so GB and GiB both mean 2**30 bytes."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        match = _SIZE.fullmatch(str(value).strip())
        if match is None:
            self.fail(f"{value!r} is not a size; use e.g. 24GB", param, ctx)
        return round(float(match[1]) * 2**30)


class Duration(click.ParamType):
    """Seconds of a time such as `90min` or `2h`; a number alone is seconds."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        match = _DURATION.fullmatch(str(value).strip())
        if match is None or not float(match[1]):
            self.fail(f"{value!r} is not a time; use e.g. 90min, 2h or 3d", param, ctx)
        return float(match[1]) * _SECONDS[(match[2] or "s")[0].lower()]


@click.command()
@click.option(
    "--env",
    "-e",
    default=None,
    shell_complete=completion.environments,
    help="Recipe (a folder of conf/), as in `kedro run --env`.",
)
@click.option("--params", default="", callback=split_params, help="As in `kedro run --params`.")
@click.option("--gpu-memory", type=GpuMemory(), metavar="24GB", help="Show what does not fit in this much memory.")
@click.option(
    "--samples-per-second", type=click.FloatRange(min=0, min_open=True), help="Speed to estimate the time from."
)
@click.option("--within", type=Duration(), metavar="2h", help="Show how many processes are enough for this time.")
@click.option("--from-source", is_flag=True, help="Read the source even if data_engineering has run.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON, sizes in bytes.")
def plan(
    env: str | None,
    params: dict[str, Any],
    gpu_memory: int | None,
    samples_per_second: float | None,
    within: float | None,
    from_source: bool,
    as_json: bool,
) -> None:
    """Show what a run will take: samples, steps, tokens, disk, GPU memory and the time of each stage.

    Nothing is downloaded, computed on a GPU or written. The data come from the newest data_engineering run or,
    without one, from the source. The time of a stage follows from the speed of the recipe's earlier runs with this base
    and picture size, that of training also from --samples-per-second. Without a training's speed, a table has rough
    times for usual GPUs: an estimate, not a measurement.
    """
    keep_stdout_for_results()
    from kedro.framework.session import KedroSession

    from qwen_vl_lora.parameters import validate_parameters
    from qwen_vl_lora.session.planning import find_base, find_data, find_paces, find_speed
    from qwen_vl_lora.session.sound_settings import refuse_tiny_settings, stated_keys
    from qwen_vl_lora.training.plan import make_plan

    with KedroSession.create(env=env, runtime_params=params) as session:
        assert isinstance(session, KedroSession)
        context = session.load_context()
        parameters = validate_parameters(dict(context.params))
        data = find_data(context, parameters, from_source=from_source)
        speed = find_speed(context.catalog, samples_per_second)
        paces = find_paces(context, parameters)
        base = find_base(context.catalog)
        refuse_tiny_settings(base.name, base.geometry.parameters, parameters, stated_keys(context))
        made = make_plan(base, data, parameters, gpu_memory, speed, paces, within)
    if as_json:
        say(json.dumps(dataclasses.asdict(made), indent=1))
        return
    console = terminal()
    console.print(_facts_table(made), _memory_table(made), _stages_table(made))
    if made.rough_times:
        console.print(_times_table(made))
    for line in _remarks(made):
        console.print(f"• {line}")


def _facts_table(made: Plan) -> Table:
    from rich.table import Table

    about = " (estimated: the tokenizer is not on this machine)" if made.tokens_are_estimated else ""
    samples = made.samples
    rows = [
        ("base model", f"{made.base}, {'on this machine' if made.base_is_here else 'not on this machine'}"),
        ("to download", shown_bytes(made.download) if made.download else "nothing for the base"),
        ("data", made.data),
        ("samples", f"{samples['train']} train, {samples['validation']} validation, {samples['test']} test"),
        ("rejected rows", str(made.rejected_rows)),
        ("pictures", str(made.pictures)),
        ("optimizer steps", f"{made.steps}, of {made.samples_per_step} samples"),
        ("tokens of a sample", f"{_spread(made.tokens)}{about}"),
        ("longer than max_length", f"{len(made.too_long)}{_some(made.too_long)}"),
        ("image tokens of a picture", _spread(made.image_tokens) if made.image_tokens else "no pictures"),
        ("pictures on disk", shown_bytes(made.stored_pictures) if made.stored_pictures else "no copies"),
        ("features on disk", shown_bytes(made.features)),
        ("adapter on disk", f"{shown_bytes(made.adapter)}; a checkpoint {shown_bytes(3 * made.adapter)}"),
        ("trainable parameters", f"{made.trainable_parameters:,}"),
        ("training time", _time(made)),
    ]
    table = Table(show_header=False)
    for _ in ("name", "value"):
        table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    return table


def _memory_table(made: Plan) -> Table:
    from rich.table import Table

    limit = f" of {shown_bytes(made.gpu_memory)}" if made.gpu_memory else ""
    table = Table(title=f"GPU memory by captions of one forward pass, {made.dtype}, estimated", title_justify="left")
    for heading in ("captions", "tokens", "allocated", f"needed{limit}", ""):
        table.add_column(heading, justify="right" if heading else "left", overflow="fold")
    for need in made.memory:
        verdict = {True: "fits", False: "does not fit", None: ""}[need.fits]
        mark = " ← configured" if need.is_configured else ""
        cells = [str(need.batch_size), str(need.tokens), shown_bytes(need.allocated), shown_bytes(need.needed)]
        table.add_row(*cells, f"{verdict}{mark}")
    return table


def _stages_table(made: Plan) -> Table:
    from rich.table import Table

    table = Table(title="Time by stage, at the speed of earlier runs", title_justify="left")
    for heading in ("stage", "work", "time", "a process does"):
        table.add_column(heading, justify="right" if heading in ("work", "time") else "left", overflow="fold")
    for stage in made.stages:
        pace = f"{stage.pace.per_second:.3g} {stage.unit}/s ({stage.pace.source})" if stage.pace else "not measured yet"
        time = "unknown" if stage.seconds is None else _duration(stage.seconds)
        table.add_row(stage.name, f"{stage.count:,} {stage.unit}", time, pace)
    return table


def _times_table(made: Plan) -> Table:
    from rich.table import Table

    from qwen_vl_lora.training.duration import UTILIZATION

    highest, lowest = UTILIZATION
    title = (
        "Training time, rough estimate, not measured: "
        f"FLOPs / (published peak x {highest:.0%} to {lowest:.0%}), or waits between kernels; "
        "without encoding and evaluation"
    )
    table = Table(title=title, title_justify="left")
    for heading in ("GPU", "memory", "peak, dense bfloat16", "time", ""):
        table.add_column(heading, justify="left" if heading in ("GPU", "") else "right", overflow="fold")
    for rough in made.rough_times:
        shortest, longest = rough.seconds
        times = f"{_duration(shortest)} to {_duration(longest)}"
        table.add_row(
            rough.gpu, f"{rough.memory} GB", f"{rough.teraflops:g} TFLOP/s", times, "" if rough.fits else "does not fit"
        )
    return table


def _remarks(made: Plan) -> list[str]:
    lines = []
    if made.stops_on_too_long:
        lines.append(
            "Too many samples are longer than max_length: training would stop. Raise it, or lower the image size."
        )
    if made.changes:
        assert made.gpu_memory is not None
        lines.append(f"The configured training does not fit in {shown_bytes(made.gpu_memory)}. What needs less:")
        for change in made.changes:
            verdict = "fits" if change.bytes <= made.gpu_memory else "does not fit"
            lines.append(f"  {change.setting}: {shown_bytes(change.bytes)}, {verdict}")
    fitting = [need.batch_size for need in made.memory if need.fits]
    if fitting and not any(need.is_configured for need in made.memory):
        lines.append(f"per_device_train_batch_size: auto would take {max(fitting)} captions, by this estimate.")
    lines += [_on_features(made.feature_use)] if made.feature_use else []
    lines += [_on_processes(made.within)] if made.within else []
    return [*lines, *made.notes]


def _on_features(use: FeatureUse) -> str:
    times = f"Training needs the features of a picture {use.uses:.2g} times"
    took = ""
    if use.stored_seconds is not None and use.streamed_seconds is not None and use.streamed_seconds >= 1:
        took = f" ({_duration(use.streamed_seconds)} in place of {_duration(use.stored_seconds)} in one process)"
    if use.pays:
        return f"{times}: stored features pay; with vision: adapted each picture would be encoded at each use{took}."
    return (
        f"{times}: encoding in the stream (vision: adapted) takes the same time and needs no disk; stored features pay "
        "from the second epoch, caption or run with the same pictures."
    )


def _on_processes(within: Within) -> str:
    without = f" Without {', '.join(within.left_out)}, whose speed is unknown." if within.left_out else ""
    processes = "1 process is" if within.processes == 1 else f"{within.processes} processes are"
    return (
        f"{processes} enough for {_duration(within.seconds)}, by calculation: the work of all stages divided evenly."
        f"{without}"
    )


def _spread(spread: Spread) -> str:
    if spread.min == spread.max:
        return str(spread.max)
    return f"min {spread.min}, median {spread.median}, p95 {spread.p95}, max {spread.max}"


def _some(ids: list[str]) -> str:
    return f": {', '.join(ids[:5])}{' …' if len(ids) > 5 else ''}" if ids else ""


def _time(made: Plan) -> str:
    if made.seconds is None or made.speed is None:
        below = "below, roughly; " if made.rough_times else "unknown; "
        return f"{below}for a better figure give --samples-per-second, or train once"
    speed = f"{made.speed.samples_per_second:g} samples/s ({made.speed.source})"
    return f"{_duration(made.seconds)} at {speed}; without encoding and evaluation"


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    if seconds < 1:
        return "below 1 s"
    return f"{seconds:.0f} s" if minutes < 3 else f"{minutes:.0f} min" if minutes < 180 else f"{minutes / 60:.1f} h"
