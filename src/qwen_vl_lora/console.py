"""What the command line shows: expected errors as one message, everything else as Kedro does."""

from __future__ import annotations

import logging
import sys
import traceback
from pathlib import Path
from types import TracebackType

from qwen_vl_lora.exceptions import QwenVLLoraError

ERROR_LOG = Path("logs/errors.log")


def expected_error(error: BaseException | None) -> QwenVLLoraError | None:
    """The project's own error behind `error`; Kedro wraps what datasets raise."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, QwenVLLoraError):
            return error
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None


def show_messages_for_expected_errors() -> None:
    """Print expected errors without their traceback, which goes to `logs/errors.log`."""
    if getattr(sys.excepthook, "shows_messages", False):
        return
    following = sys.excepthook

    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        expected = expected_error(error)
        if expected is None:
            following(kind, error, trace)
            return
        sys.stderr.write(f"\nError: {expected}\n")
        _keep_traceback(error)

    show.shows_messages = True  # type: ignore[attr-defined]
    sys.excepthook = show
    # The failing node's whole message would stand twice.
    logging.getLogger("kedro.pipeline.node").addFilter(lambda record: "failed with error" not in record.getMessage())


def _keep_traceback(error: BaseException) -> None:
    try:
        ERROR_LOG.parent.mkdir(exist_ok=True)
        with ERROR_LOG.open("a", encoding="utf-8") as log:
            log.write("".join(traceback.format_exception(error)) + "\n")
        sys.stderr.write(f"(traceback: {ERROR_LOG}, or run with --verbose)\n")
    except OSError:
        sys.stderr.write("(run with --verbose for the traceback)\n")
