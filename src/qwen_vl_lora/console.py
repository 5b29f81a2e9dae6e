"""What the command line shows and how it reads `--params`: expected errors and the machine's faults are one message.

A program error keeps its traceback on the screen. The traceback of everything else goes to `logs/errors.log`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
import traceback
import warnings
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, TextIO, cast

import click

from qwen_vl_lora.exceptions import QwenVLLoraError
from qwen_vl_lora.faults import machine_fault
from qwen_vl_lora.lineage.masking import mask_text

ERROR_LOG = Path("logs/errors.log")

_NAME_OF_A_SETTING = re.compile(r"\s*[\w.-]+\s*=")


def expected_error(error: BaseException | None) -> QwenVLLoraError | None:
    """The project's own error behind `error`, or the machine's fault in words; Kedro wraps what datasets raise."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        expected = error if isinstance(error, QwenVLLoraError) else machine_fault(error)
        if expected is not None:
            return expected
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None


def project_folder() -> Path:
    """The project that the current folder lies in: commands may be called from its subfolders."""
    from kedro.utils import find_kedro_project

    return find_kedro_project(Path.cwd()) or Path.cwd()


def show_messages_for_expected_errors() -> None:
    """Print expected errors without their traceback, also when the output itself cannot be written."""
    if getattr(sys.excepthook, "shows_messages", False):
        return
    following = sys.excepthook

    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        expected = expected_error(error)
        if expected is None:
            following(kind, error, trace)
        else:
            _tell(expected, error)

    show.shows_messages = True  # type: ignore[attr-defined]
    sys.excepthook = show
    sys.stdout = cast(TextIO, _Output(sys.stdout))
    # The failing node's whole message would stand twice.
    logging.getLogger("kedro.pipeline.node").addFilter(lambda record: "failed with error" not in record.getMessage())


def keep_stdout_for_results() -> None:
    """Kedro logs to stdout, which in a command is for what it gives: `qwen-vl-lora caption *.jpg > captions.txt`."""
    warnings.filterwarnings("ignore", message=".*register_new_resolver", category=UserWarning)
    for handler in logging.getLogger().handlers:
        console = getattr(handler, "console", None)
        if console is not None:
            console.stderr = True


class _Output:
    """Standard output that ends the program in order when it cannot be written: click, rich and logging each fail
    in a way of their own, with a traceback for every line or without a word.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        with contextlib.suppress(OSError, ValueError):  # no real file, or one that knows no such mode
            os.set_blocking(stream.fileno(), True)  # a full pipe is waited for: half a line would be lost otherwise

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._give_up(error)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> NoReturn:
        error.filename = self._name()
        expected = machine_fault(error)
        if expected is None:
            raise error
        # What is buffered is written once more at exit, and must not fail then.
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, self._stream.fileno())
        os.close(devnull)
        _tell(expected, error)
        raise SystemExit(1)

    def _name(self) -> str:
        try:
            return str(Path(f"/proc/self/fd/{self._stream.fileno()}").readlink())
        except OSError:
            return "standard output"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _tell(expected: QwenVLLoraError, error: BaseException) -> None:
    with contextlib.suppress(OSError):  # nobody reads that either
        sys.stderr.write(f"\nError: {expected}\n{_keep_traceback(error)}\n")
        sys.stderr.flush()


def _keep_traceback(error: BaseException) -> str:
    """Where the traceback is found."""
    try:
        ERROR_LOG.parent.mkdir(exist_ok=True)
        with ERROR_LOG.open("a", encoding="utf-8") as log:
            log.write(mask_text("".join(traceback.format_exception(error))) + "\n")
    except OSError:
        return "(run with --verbose for the traceback)"
    return f"(traceback: {ERROR_LOG}, or run with --verbose)"


def split_params(context: click.Context, _: click.Parameter, value: Any) -> Any:
    """`--params`, in which a comma ends a value only where the name of the next one follows.

    Kedro refuses `captions_file=/data/cats, dogs/captions.csv` and `image.url_hosts=[one.example,two.example]`.
    """
    if not isinstance(value, str):
        return value
    settings: list[str] = []
    for piece in value.split(","):
        if settings and not _NAME_OF_A_SETTING.match(piece):
            settings[-1] += f",{piece}"
        elif piece.strip():
            settings.append(piece.strip())
    if settings and not _NAME_OF_A_SETTING.match(settings[0]):
        context.fail(f"--params: {settings[0]!r} must be of the form key=value; several are separated by commas.")
    from omegaconf import OmegaConf

    pairs = [setting.rstrip(", ").split("=", 1) for setting in settings]
    return OmegaConf.to_container(OmegaConf.from_dotlist([f"{name.strip()}={text}" for name, text in pairs]))
