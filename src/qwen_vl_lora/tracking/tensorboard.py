"""TensorBoard as a tracker: event files on this machine, by torch's own writer."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from qwen_vl_lora.exceptions import ParameterError
from qwen_vl_lora.names import is_name
from qwen_vl_lora.parameters import TensorBoardParameters
from qwen_vl_lora.runs.record_schema import Outcome
from qwen_vl_lora.tracking.tracker import MEASURED, Picture, Tracker

_PARAMETERS = "parameters."


class TensorBoardTracker(Tracker):
    """Event files in `<folder>/<run id>/`. `open` continues the folder of the same identity, if there is one.

    Args:
        settings: the `tensorboard` block.
        folder: of the recipe's runs.

    Raises:
        ParameterError: if TensorBoard is missing.
    """

    name = "TensorBoard"

    def __init__(self, settings: TensorBoardParameters, folder: Path) -> None:
        if importlib.util.find_spec("tensorboard") is None:
            raise ParameterError(
                "trackers has `tensorboard`, but TensorBoard is not installed: pip install 'tensorboard>=2.20', or "
                "remove it from trackers."
            )
        self._settings = settings
        self._folder = folder
        self._writer: Any = None

    def open(self, identity: str, outline: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        run = str(outline.get("run", identity))
        mark = next(self._folder.glob(f"*/{identity}"), self._folder / (run if is_name(run) else identity) / identity)
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
        # The earlier rows of a resumed training come again: what its first part wrote is replaced by them.
        self._writer = SummaryWriter(str(mark.parent), purge_step=0)
        named = {key.removeprefix(_PARAMETERS): value for key, value in outline.items() if key.startswith(_PARAMETERS)}
        plain = {
            key: value if isinstance(value, (bool, int, float, str)) else _text(value) for key, value in named.items()
        }
        for summary in hparams(plain, dict.fromkeys(MEASURED, 0.0)):
            self._writer.file_writer.add_summary(summary)

    def row(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def pictures(self, shown: Iterator[Picture], step: int) -> None:
        for place, (image, text) in enumerate(islice(shown, self._settings.prediction_images)):
            self._writer.add_image(f"Prediction/{place}", _pixels(image), step, dataformats="HWC")
            self._writer.add_text(f"Prediction/{place}", _indented(text), step)

    def end(self, outcome: Outcome, error: str | None, outline: Mapping[str, Any]) -> None:
        facts = {"outcome": outcome, **({"error": error} if error else {}), **outline}
        self._writer.add_text("run", _indented("\n".join(f"{name}: {_text(value)}" for name, value in facts.items())))
        self._writer.close()

    def drop(self) -> None:
        if self._writer is not None:
            self._writer.close()


def _pixels(image: Any) -> Any:
    import numpy as np

    return np.asarray(image)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _indented(text: str) -> str:
    """Text that Markdown shows as it is, line by line."""
    return "\n".join(f"    {line}" for line in text.splitlines())
