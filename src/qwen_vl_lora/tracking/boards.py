"""Boards of this machine, which show runs in the browser: which is installed, and what it is told of stored runs."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

from qwen_vl_lora.exceptions import MissingArtifactError
from qwen_vl_lora.parameters import SwanLabParameters, TensorBoardParameters
from qwen_vl_lora.runs.records import Record
from qwen_vl_lora.runs.run import Run
from qwen_vl_lora.tracking.swanlab import SwanLabTracker
from qwen_vl_lora.tracking.tensorboard import TensorBoardTracker
from qwen_vl_lora.tracking.tracker import Picture, TrackedRun, Tracker, identity_of, picture_text

PICTURES = 8

Guard = Callable[[Any], Any]
"""Wraps an application, so that it answers this machine's own browser alone."""


class Board(Protocol):
    """A board for the runs of one recipe.

    Attributes:
        name: in messages.
        interface: of its application, for the guard.
    """

    name: str
    interface: Literal["asgi", "wsgi"]

    def has(self, identity: str) -> bool:
        """Whether the run of this identity is on the board."""
        ...

    def tracker(self) -> Tracker:
        """Puts one run on the board."""
        ...

    def serve(self, host: str, port: int, guard: Guard) -> None:
        """Serve the board until the process is interrupted."""
        ...


class SwanLabBoard(Board):
    """SwanLab's board over `logs/swanlab/<recipe>`."""

    name = "SwanLab's board"
    interface = "asgi"

    def __init__(self, logs: Path, recipe: str) -> None:
        self._folder = (logs / "swanlab" / recipe).absolute()

    def has(self, identity: str) -> bool:
        return any(self._folder.glob(f"run-*-{identity}/logs/*/*"))  # runs of mode offline have none

    def tracker(self) -> Tracker:
        settings = SwanLabParameters(
            mode="local", project="qwen-vl-lora", experiment_name=None, workspace=None, prediction_images=PICTURES
        )
        return SwanLabTracker(settings, self._folder)

    def serve(self, host: str, port: int, guard: Guard) -> None:
        os.environ["SWANLAB_LOG_DIR"] = str(self._folder)  # read by the import
        import uvicorn
        from swanboard.app import app
        from swanboard.db import connect

        connect(path=str(self._folder))
        uvicorn.run(guard(app), host=host, port=port, log_level="error")


class TensorBoardBoard(Board):
    """TensorBoard over `logs/tensorboard/<recipe>`."""

    name = "TensorBoard"
    interface = "wsgi"

    def __init__(self, logs: Path, recipe: str) -> None:
        self._folder = logs / "tensorboard" / recipe

    def has(self, identity: str) -> bool:
        return any(self._folder.glob(f"*/{identity}"))

    def tracker(self) -> Tracker:
        return TensorBoardTracker(TensorBoardParameters(prediction_images=PICTURES), self._folder)

    def serve(self, host: str, port: int, guard: Guard) -> None:
        from tensorboard import program

        class GuardedServer(program.WerkzeugServer):
            def __init__(self, application: Any, flags: Any) -> None:
                super().__init__(guard(application), flags)

            def print_serving_message(self) -> None:
                pass

        board = program.TensorBoard(server_class=GuardedServer)
        # load_fast would start a second server, without a guard.
        board.configure(("",), logdir=str(self._folder), host=host, port=port, load_fast="false", reload_interval=5.0)
        if board.main() != 0:  # it has said why
            raise SystemExit(1)
        raise KeyboardInterrupt  # which its server takes for its own end


def choose_board(logs: Path, recipe: str) -> Board:
    """The board that is installed: SwanLab's, else TensorBoard.

    Raises:
        MissingArtifactError: if none is, with the command that installs one.
    """
    if importlib.util.find_spec("swanboard") is not None:
        return SwanLabBoard(logs, recipe)
    if importlib.util.find_spec("tensorboard") is not None:
        return TensorBoardBoard(logs, recipe)
    raise MissingArtifactError(
        "No board is installed: pip install 'tensorboard>=2.20' (or 'swanlab[dashboard]', SwanLab's own). Nothing of "
        "it needs an account or leaves this machine."
    )


def show_stored(board: Board, records: Sequence[Record], project: Path) -> int:
    """Put those of these runs on the board that trained or evaluated and are not there. Returns their number."""
    new = 0
    for record in records:
        rows = list(_rows(_path_of(record, "training_log", project)))
        metrics = record.facts.get("results", {}).get("caption_metrics")
        identity = identity_of(rows[0] if rows else {}, record.id)
        if (not rows and not metrics) or record.is_under_way or board.has(identity):
            continue
        run = Run(record.id, read=record.read, written=record.written, facts=dict(record.facts))
        tracked = TrackedRun([board.tracker()], run)
        for row in rows:
            tracked.log_row(row)
        if metrics:
            tracked.log_evaluation(metrics, partial(_pictures, record, project))
        tracked.end(record.outcome, record.facts.get("message"))
        new += 1
    return new


def _path_of(record: Record, dataset: str, project: Path) -> Path | None:
    path = record.written.get(dataset, {}).get("path")
    return project / path if path and (project / path).is_file() else None


def _rows(training_log: Path | None) -> Iterator[dict[str, Any]]:
    """Rows of `training_log` as they were logged."""
    for row in _table(training_log):
        yield {name: int(text) if name == "step" else float(text) for name, text in row.items() if text}


def _pictures(record: Record, project: Path) -> Iterator[Picture]:
    from PIL import Image

    for row in _table(_path_of(record, "predictions", project)):
        if (project / row["image_path"]).is_file():
            references = json.loads(row["references"])
            with Image.open(project / row["image_path"]) as image:
                yield image, picture_text(row["tuned_caption"], row["base_caption"], references[0])


def _table(path: Path | None) -> Iterator[Mapping[str, str]]:
    if path is not None:
        with path.open(newline="", encoding="utf-8") as file:
            yield from csv.DictReader(file)
