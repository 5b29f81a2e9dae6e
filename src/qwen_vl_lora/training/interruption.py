"""Signals during a training: finish the step, save its checkpoint, and stop all ranks at the same step."""

from __future__ import annotations

import logging
import signal
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from qwen_vl_lora.cluster import here
from qwen_vl_lora.exceptions import CTRL_C
from qwen_vl_lora.runs.artifacts import relative
from qwen_vl_lora.runs.run import RunInterruptedError

logger = logging.getLogger(__name__)

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class SaveOnSignal:
    """Context in which SIGTERM and Ctrl-C finish the step, save a checkpoint and stop; a second one stops at once."""

    def __init__(self) -> None:
        self._received: signal.Signals | None = None
        self._agreed: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._give_back()

    def agree(self, where: str) -> bool:
        """Whether any rank got a signal. All ranks get the same answer, so they stop at the same step."""
        asked = int(max(told[0] for told in here.gather([self._received or here.asked_to_stop or 0], where)))
        self._agreed = signal.Signals(asked) if asked else None
        return asked != 0

    def stop_if_asked(self, step: int, steps: int, folder: Path) -> None:
        """End the run if a signal asked for it. The checkpoint of `step` must be saved in `folder`.

        Raises:
            RunInterruptedError: with the command to resume.
        """
        if self._agreed is not None:
            stopped = RunInterruptedError(
                f"Stopped by {self._agreed.name} after step {step} of {steps}. Its checkpoint "
                f"is saved in {relative(folder, Path.cwd())}; the same command resumes from there."
            )
            if self._agreed == signal.SIGINT:
                stopped.exit_code = CTRL_C
            raise stopped

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = signal.Signals(number)
        self._give_back()
        logger.warning("%s: saving a checkpoint after this step. A second signal stops at once.", self._received.name)

    def _give_back(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
