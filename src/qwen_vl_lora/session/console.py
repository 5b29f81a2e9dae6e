"""Command-line output: safe text, and one message for each expected error or machine fault.

A program error prints its traceback. All other tracebacks go to the project's `logs/errors.log`.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import errno
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO, cast

from rich.console import Console, ConsoleRenderable, Group
from rich.logging import RichHandler
from rich.text import Text

from qwen_vl_lora.exceptions import CTRL_C, MissingArtifactError, QwenVLLoraError
from qwen_vl_lora.faults import machine_fault
from qwen_vl_lora.runs.masking import mask_text, remember
from qwen_vl_lora.texts import visible, visible_output

ERROR_LOG = Path("logs/errors.log")
"""Relative to the project folder."""

_STREAMS = (("stdin", os.O_RDONLY), ("stdout", os.O_WRONLY), ("stderr", os.O_WRONLY))

_project: Path | None = None
"""Read at start, because the working directory may be removed later."""


def say(text: str, *, err: bool = False) -> None:
    """Print one or more lines to standard output, or to standard error."""
    stream = sys.stderr if err else sys.stdout
    stream.write(f"{visible(text)}\n")
    stream.flush()


class _PlainConsole(Console):
    """Prints every text literally: no markup, no emoji names, no control characters."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(visible(text), **options)


def terminal(*, piped_width: int | None = None) -> Console:
    """Return the console that tables are printed to.

    Args:
        piped_width: width in columns when the output is a file or pipe; default: 80, by rich.
    """
    is_shown = Console().is_terminal
    return _PlainConsole(markup=False, emoji=False, highlight=False, width=None if is_shown else piped_width)


class _WholeLines(RichHandler):
    """Logs each record on one line, which a terminal wraps: a path or command in it can be clicked and copied."""

    def __init__(self, replaced: RichHandler) -> None:
        console = _PlainConsole(stderr=replaced.console.stderr, markup=False, emoji=False, soft_wrap=True)
        super().__init__(replaced.level, console, markup=False, rich_tracebacks=replaced.rich_tracebacks)
        self.formatter, self.filters = replaced.formatter, replaced.filters

    def render(
        self, *, record: logging.LogRecord, traceback: Any, message_renderable: ConsoleRenderable
    ) -> ConsoleRenderable:
        stamp = dt.datetime.fromtimestamp(record.created).strftime("[%X] ")
        line = Text.assemble((stamp, "log.time"), self.get_level_text(record), " ")
        line += message_renderable if isinstance(message_renderable, Text) else Text(record.getMessage())
        return Group(line, traceback) if traceback else line


def expected_error(error: BaseException | None) -> QwenVLLoraError | None:
    """Return the project's error behind `error`, or its machine fault. Kedro wraps the errors of datasets."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        expected = error if isinstance(error, QwenVLLoraError) else machine_fault(error)
        if expected is not None:
            return expected
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None


def find_project() -> Path | None:
    """Return the project that contains the current folder: commands may be called from subfolders.

    Raises:
        MissingArtifactError: if the current folder was removed.
    """
    from kedro.utils import find_kedro_project

    try:
        folder = Path.cwd()
    except FileNotFoundError as error:
        raise MissingArtifactError(
            "The current folder no longer exists: it was removed or moved. Change to the project folder (cd) and "
            "repeat the command."
        ) from error
    return find_kedro_project(folder)


def project_folder() -> Path:
    """Return the project that contains the current folder, or the current folder itself."""
    return find_project() or Path.cwd()


def prepare_terminal() -> None:
    """Make the standard streams accept any text, remove control sequences, and mask secrets in logs.

    Printing cannot end a run: closed streams are redirected to the null device, and characters that the encoding
    lacks are escaped.
    """
    global _project
    remember(os.environ, sys.argv)
    _open_closed_streams()
    for name in ("stdout", "stderr"):
        if not isinstance(getattr(sys, name), _Output):
            setattr(sys, name, cast(TextIO, _Output(getattr(sys, name), ends_program=name == "stdout")))
    handlers = logging.getLogger().handlers
    handlers[:] = [_WholeLines(one) if isinstance(one, RichHandler) else one for one in handlers]
    for handler in handlers:
        if _clean not in handler.filters:
            handler.addFilter(_clean)
    with contextlib.suppress(MissingArtifactError):
        _project = find_project()


def _open_closed_streams() -> None:
    """Open standard streams that a service closed (`>&-`): the next opened file would take their descriptor."""
    for number, (name, mode) in enumerate(_STREAMS):
        if getattr(sys, name) is not None:
            continue
        try:
            os.fstat(number)
            nowhere = os.open(os.devnull, mode)  # the descriptor is already in use
        except OSError:
            nowhere = os.open(os.devnull, mode)
            os.dup2(nowhere, number)  # for child processes too
            if nowhere != number:
                os.close(nowhere)
            os.set_inheritable(number, True)
            nowhere = number
        setattr(sys, name, os.fdopen(nowhere, "r" if mode == os.O_RDONLY else "w", encoding="utf-8", closefd=False))


def _clean(record: logging.LogRecord) -> bool:
    """Filter of a log handler: replace the message with its safe, masked form."""
    with contextlib.suppress(TypeError, ValueError):  # logging reports wrong arguments itself
        record.msg, record.args = visible(mask_text(record.getMessage())), None
    return True


def show_messages_for_expected_errors() -> None:
    """Print expected errors without their traceback."""
    if getattr(sys.excepthook, "shows_messages", False):
        return
    following = sys.excepthook

    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        expected = expected_error(error)
        if expected is None:
            following(kind, error, trace)
        else:
            _tell(expected, error)
            raise SystemExit(expected.exit_code)  # from a hook, it sets the exit code of the process

    show.shows_messages = True  # type: ignore[attr-defined]
    show.following = following  # type: ignore[attr-defined]
    sys.excepthook = show
    # Kedro would print the message of the failing node a second time.
    logging.getLogger("kedro.pipeline.node").addFilter(lambda record: "failed with error" not in record.getMessage())
    for name in ("sequential_runner", "thread_runner"):
        logging.getLogger(f"kedro.runner.{name}").addFilter(_is_no_advice)


def _is_no_advice(record: logging.LogRecord) -> bool:
    """Kedro advises to repeat the command, or `--from-nodes`; the error says what to do in this project."""
    return not record.getMessage().startswith("No nodes ran.") and "nodes that have not run" not in record.getMessage()


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """End the command on Ctrl-C, and say what became of the work."""
    try:
        yield
    except KeyboardInterrupt:
        say("\nInterrupted. Finished work is kept; repeat the command to continue.", err=True)
        raise SystemExit(CTRL_C) from None


def keep_stdout_for_results() -> None:
    """Send logs to stderr. Kedro logs to stdout, which is for results: `qwen-vl-lora caption *.jpg > captions.txt`."""
    warnings.filterwarnings("ignore", message=".*register_new_resolver", category=UserWarning)
    for handler in logging.getLogger().handlers:
        console = getattr(handler, "console", None)
        if console is not None:
            console.stderr = True


def show_tracebacks() -> None:
    """Undo `show_messages_for_expected_errors`: `--verbose`."""
    sys.excepthook = getattr(sys.excepthook, "following", sys.excepthook)


class _Output:
    """A standard stream that accepts any text and ends the program cleanly when it can no longer be written.

    click, rich and logging each fail differently: with a traceback for every line, or silently.

    Args:
        ends_program: whether the program ends when the reader is gone. Otherwise further output is dropped.
    """

    def __init__(self, stream: TextIO, *, ends_program: bool) -> None:
        self._stream = stream
        self._ends_program = ends_program
        colours = bool(os.environ.get("FORCE_COLOR")) or os.environ.get("TTY_COMPATIBLE") == "1"  # as rich reads them
        self._is_styled = stream.isatty() or colours
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            with contextlib.suppress(OSError):  # the file behind the stream was replaced
                reconfigure(errors="backslashreplace")
        with contextlib.suppress(OSError, ValueError):  # not a real file, or one without a blocking mode
            os.set_blocking(stream.fileno(), True)  # wait for a full pipe: otherwise part of a line is lost

    def write(self, text: str) -> int:
        try:
            self._stream.write(visible_output(text, styled=self._is_styled))
        except OSError as error:
            self._give_up(error)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        error.filename = self._name()
        if error.errno == errno.EIO and self._is_styled:
            error.errno = errno.EPIPE  # the error of a closed terminal
        expected = machine_fault(error)
        if expected is None:
            raise error
        # Python flushes the buffer again at exit, which must not fail.
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, self._stream.fileno())
        os.close(devnull)
        if self._ends_program:
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
    with contextlib.suppress(OSError):  # that stream has no reader either
        sys.stderr.write(f"\nError: {visible(mask_text(str(expected)))}\n{_keep_traceback(error)}\n")
        sys.stderr.flush()


def _keep_traceback(error: BaseException) -> str:
    """Say where the traceback is: in the project's log, and nowhere outside a project."""
    if _project is None:
        return ""
    file = _project / ERROR_LOG
    try:
        file.parent.mkdir(exist_ok=True)
        with file.open("a", encoding="utf-8") as log:
            log.write(visible(mask_text("".join(traceback.format_exception(error)))) + "\n")
        is_here = _project == Path.cwd()
    except OSError:
        return "(run with --verbose for the traceback)"
    return f"(traceback: {visible(str(ERROR_LOG if is_here else file))}, or run with --verbose)"
