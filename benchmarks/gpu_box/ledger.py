"""Parts in their order, within the minutes that there are, and a line in the results after each."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measuring import Record, report

FINAL = ("done", "skipped")
"""States of a part that is not carried out again."""


class SkippedError(Exception):
    """A part that this machine cannot do; its text is the reason."""


class CutOffError(Exception):
    """The time is over, or the process was asked to end."""


@dataclass(frozen=True)
class Part:
    """One line of the results.

    Attributes:
        seconds: expected on an H200; it is not begun with less time left.
        work: gives its figures. What must hold and does not, it lists under `failures`.
        needs: names of parts whose results it reads.
    """

    name: str
    seconds: int
    work: Callable[[], Record]
    needs: tuple[str, ...] = ()


def carry_out(parts: Sequence[Part], file: Path, minutes: float, origin: Record) -> list[Record]:
    """Do what `file` does not hold yet, and give all its lines.

    The time limit and SIGTERM end the part that runs, with its process. A failed part does not stop the others.

    Args:
        file: lines of JSON; a `.md` with the same name is written beside it.
        minutes: from now.
        origin: what all lines say of machine and code. `code` says which earlier lines count.
    """
    ends = time.monotonic() + 60 * minutes
    lines = read_lines(file)
    with _until(ends):
        for part in parts:
            done = finished(lines, origin["code"])
            if part.name in done:
                report(f"{part.name}: done before")
            elif not done.issuperset(part.needs):
                report(f"{part.name}: waits for {', '.join(part.needs)}")
            elif part.seconds > ends - time.monotonic():
                report(f"{part.name}: left out, it takes about {part.seconds} s")
            else:
                lines.append({"part": part.name, **_attempt(part), **origin})
                _write(file, lines)
                if lines[-1]["state"] == "cut off":
                    break
    return lines


def finished(lines: Sequence[Record], code: str) -> set[str]:
    """Names of the parts that need not be done again."""
    return {line["part"] for line in lines if line["code"] == code and line["state"] in FINAL}


def read_lines(file: Path) -> list[Record]:
    if not file.is_file():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def _attempt(part: Part) -> Record:
    report(f"{part.name}: begins")
    started = time.monotonic()
    try:
        outcome = {"state": "done", **part.work()}
    except SkippedError as reason:
        outcome = {"state": "skipped", "reason": str(reason)}
    except CutOffError:
        outcome = {"state": "cut off"}
    except Exception as error:  # the other parts are worth their time
        outcome = {"state": "failed", "reason": f"{type(error).__name__}: {error}"}
    outcome["wall_s"] = round(time.monotonic() - started, 1)
    report(f"{part.name}: {json.dumps(outcome)}")
    return outcome


def _write(file: Path, lines: Sequence[Record]) -> None:
    with file.open("a", encoding="utf-8") as log:
        log.write(json.dumps(lines[-1]) + "\n")
    file.with_suffix(".md").write_text(render_log(lines), encoding="utf-8")


def render_log(lines: Sequence[Record]) -> str:
    """All lines as Markdown: machine and versions once, then a section for each part."""
    last = lines[-1]
    written = [f"{last['machine']}; commit {last['commit']}; {json.dumps(last['versions'])}", ""]
    for line in lines:
        told = {name: value for name, value in line.items() if name not in ("machine", "versions", "part", "code")}
        written += [f"## {line['part']}: {told.pop('state')}, {told.pop('wall_s')} s", ""]
        written += [f"- {name}: {json.dumps(value)}" for name, value in told.items()] + [""]
    return "\n".join(written)


@contextmanager
def _until(ends: float) -> Iterator[None]:
    """Raises `CutOffError` in this thread at that time, or at SIGTERM."""

    def cut(*_: object) -> None:
        raise CutOffError

    timer = threading.Timer(max(0, ends - time.monotonic()), os.kill, (os.getpid(), signal.SIGTERM))
    timer.daemon = True
    before = signal.signal(signal.SIGTERM, cut)
    timer.start()
    try:
        yield
    except CutOffError:  # between two parts
        report("cut off")
    finally:
        timer.cancel()
        signal.signal(signal.SIGTERM, before)
