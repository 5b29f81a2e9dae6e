"""The stage: where a collection checks pictures and lays down their bytes before `images` is saved.

Reads only below allowed folders, decodes each distinct picture once however many rows hold it, and
may be used by several threads. Knows nothing of rows.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import stat
import threading
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from qwen_vl_lora.hub.addresses import address_of_path
from qwen_vl_lora.hub.fetching import FetchError
from qwen_vl_lora.parameters import ImageParameters
from qwen_vl_lora.samples.image_files import inspect_image
from qwen_vl_lora.samples.image_store import FILES_FOLDER, ImageEntry
from qwen_vl_lora.samples.records import Reason, RowError

MAX_FILE_BYTES = 256 * 2**20
"""Largest encoded image that is read into memory."""

_NOT_THE_FILES_FAULT = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""The machine has run out of something: rejecting the row for it would lose a good one."""

FETCHED_FOLDER = "fetched"
"""Below the stage: for each address that was fetched, a note with the name of its file in the store."""

Fetch = Callable[[str], bytes]
"""Gives the bytes behind an address, or raises `FetchError`."""

_STORED_NAME = re.compile(r"[0-9a-f]{64}\.[a-z]+")
_REASONS: dict[str, Reason] = {"refused": "url_not_allowed", "too_large": "file_too_large", "failed": "missing_image"}


@dataclass(frozen=True, slots=True)
class DataFolders:
    """The folders of a recipe that a collection must know to name a picture's final place.

    The catalog keeps `workspace` in `<project>/data/09_workspace/<recipe>` and `images` in
    `<project>/data/02_intermediate/<recipe>/images`; saving `images` elsewhere is refused.
    """

    project: Path
    images: Path
    stage: Path

    @classmethod
    def of(cls, workspace: Path) -> DataFolders:
        workspace = workspace.absolute()
        data = workspace.parent.parent
        return cls(
            project=data.parent,
            images=data / "02_intermediate" / workspace.name / "images",
            stage=workspace / "images",
        )

    @property
    def files(self) -> Path:
        return self.images / FILES_FOLDER


class Picture(NamedTuple):
    """A distinct picture on the stage. Kept for every image of a run, hence small."""

    sha256: str
    suffix: str
    width: int
    height: int
    num_bytes: int
    look: bytes


class _Fault(NamedTuple):
    """A fault without the traceback of its exception, which would keep the image's bytes alive."""

    reason: Reason
    detail: str


class ImageStage:
    """Checks pictures and stages their bytes, each distinct picture once."""

    def __init__(
        self,
        folders: DataFolders,
        limits: ImageParameters,
        source_folders: Sequence[Path],
        fetch: Fetch | None = None,
    ) -> None:
        """`source_folders` may be read beside the project and `image.allowed_roots`; without `fetch` no address is."""
        self._fetch = fetch
        self._address_locks: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
        self._folders = folders
        self._content_folder = folders.files.relative_to(folders.project).as_posix()
        self._limits = limits
        self._allowed_roots = readable_roots(folders.project, source_folders, limits)
        self._lock = threading.Lock()
        self._by_content: dict[str, Picture | _Fault | Exception | threading.Event] = {}
        self._by_path: dict[str, Picture | _Fault] = {}
        self._stage_folder, self._files_folder = str(folders.stage), str(folders.files)
        folders.stage.mkdir(parents=True, exist_ok=True)

    def add(self, image: bytes | Path) -> Picture:
        """Check a picture and stage its bytes.

        Raises:
            RowError: when it cannot be read or used.
            OSError: when its bytes cannot be written; what was staged so far serves the next run.
        """
        outcome = self._add_bytes(image) if isinstance(image, bytes) else self._add_file(str(image))
        if isinstance(outcome, _Fault):
            raise RowError(outcome.reason, outcome.detail)
        return outcome

    def entry(self, image_id: str, picture: Picture) -> ImageEntry:
        """The line of the manifest for a picture."""
        return ImageEntry(
            image_id,
            picture.sha256,
            self._content_folder,
            picture.suffix,
            picture.width,
            picture.height,
            picture.num_bytes,
        )

    def _add_file(self, path: str) -> Picture | _Fault:
        address = address_of_path(path)
        if address is not None:
            with self._lock:
                lock = self._address_locks[address]
            with lock:  # rows that share a picture stand together: one fetches, the others wait
                return self._by_path.get(path) or self._add_new(path, address, lambda: self._read_address(address))
        known = self._by_path.get(path)
        return known or self._add_new(path, path, lambda: read_allowed_file(path, self._allowed_roots))

    def _add_new(self, path: str, shown: str, read: Callable[[], bytes]) -> Picture | _Fault:
        try:
            added = self._add_bytes(read())
        except RowError as fault:
            added = _Fault(fault.reason, fault.detail)
        if isinstance(added, _Fault):
            added = added._replace(detail=f"{shown}: {added.detail}")
        elif shown != path:
            self._note_fetched(shown, added)
        self._by_path[path] = added
        return added

    def _read_address(self, address: str) -> bytes:
        """The bytes behind an address: from the store when an earlier run fetched them, else from the network."""
        if self._fetch is None:
            raise RowError(
                "url_not_allowed",
                "It is a URL; to have it fetched, set image.allow_urls: true and list image.url_hosts.",
            )
        stored = self._read_fetched(address)
        if stored is not None:
            return stored
        try:
            return self._fetch(address)
        except FetchError as fault:
            raise RowError(_REASONS[fault.kind], fault.detail) from fault

    def _note_of(self, address: str) -> Path:
        return self._folders.stage / FETCHED_FOLDER / hashlib.sha256(address.encode()).hexdigest()

    def _read_fetched(self, address: str) -> bytes | None:
        try:
            name = self._note_of(address).read_text(encoding="ascii")
        except (OSError, UnicodeError):
            return None
        if not _STORED_NAME.fullmatch(name):
            return None
        for folder in (self._folders.files, self._folders.stage):
            try:
                data = (folder / name).read_bytes()
            except OSError:
                continue
            if hashlib.sha256(data).hexdigest() == name.partition(".")[0]:
                return data
        return None

    def _note_fetched(self, address: str, picture: Picture) -> None:
        note = self._note_of(address)
        unfinished = note.with_name(f".{note.name}.{os.getpid()}")
        with contextlib.suppress(OSError):  # without its note a picture is fetched once more, and nothing else
            note.parent.mkdir(exist_ok=True)
            unfinished.write_text(f"{picture.sha256}{picture.suffix}", encoding="ascii")
            unfinished.replace(note)

    def _add_bytes(self, data: bytes) -> Picture | _Fault:
        sha256 = hashlib.sha256(data).hexdigest()
        with self._lock:
            known = self._by_content.setdefault(sha256, waiting := threading.Event())
        if known is waiting:
            return self._inspect(data, sha256, waiting)
        if isinstance(known, threading.Event):
            known.wait()  # another thread has this very picture in hand, so this cannot block for ever
            known = self._by_content[sha256]
        if isinstance(known, Exception):  # what stopped that thread stops this one
            raise known
        assert not isinstance(known, threading.Event)
        return known

    def _inspect(self, data: bytes, sha256: str, waiting: threading.Event) -> Picture | _Fault:
        try:
            facts = inspect_image(data, self._limits)
            self._stage(data, f"{sha256}{facts.suffix}")
            outcome: Picture | _Fault = Picture(sha256, facts.suffix, facts.width, facts.height, len(data), facts.look)
            self._by_content[sha256] = outcome
        except RowError as fault:
            outcome = self._by_content[sha256] = _Fault(fault.reason, fault.detail)
        except Exception as error:
            self._by_content[sha256] = error
            raise
        finally:
            waiting.set()
        return outcome

    def _stage(self, data: bytes, name: str) -> None:
        """Write the bytes unless they are staged or stored already, compared byte by byte."""
        staged = f"{self._stage_folder}/{name}"
        if _holds(f"{self._files_folder}/{name}", data) or _holds(staged, data):
            return
        unfinished = f"{self._stage_folder}/.{name}.{os.getpid()}"  # two runs may share a workspace
        try:
            Path(unfinished).write_bytes(data)
            os.replace(unfinished, staged)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(unfinished)
            raise


def readable_roots(project: Path, folders: Sequence[Path], image: ImageParameters) -> tuple[str, ...]:
    """The real places of the folders whose pictures may be read: the project, `folders` and `image.allowed_roots`."""
    allowed = (project, *folders, *(project / Path(root).expanduser() for root in image.allowed_roots))
    return tuple(dict.fromkeys(os.path.realpath(root) for root in allowed))


def read_allowed_file(path: str, allowed_roots: Sequence[str]) -> bytes:
    """Read an image file whose real place, links followed, lies below one of the folders.

    Raises:
        RowError: `outside_allowed_roots`, `missing_image`, `unreadable_file` or `file_too_large`.
    """
    try:
        real = os.path.realpath(path)
        if not any(real.startswith(f"{root.rstrip(os.sep)}{os.sep}") for root in allowed_roots):
            raise RowError(
                "outside_allowed_roots",
                f"The file lies outside the folders that may be read ({', '.join(allowed_roots)}). "
                f"To allow it, add its folder to image.allowed_roots: [{Path(real).parent}].",
            )
        return _read_regular_file(real)
    except RowError:
        raise
    except (FileNotFoundError, NotADirectoryError) as error:
        raise RowError("missing_image", f"There is no such file.{_look_alike(path)}") from error
    except ValueError as error:  # a NUL in the name
        raise RowError("missing_image", f"There can be no such file: {error}.") from error
    except OSError as error:
        if error.errno in _NOT_THE_FILES_FAULT:
            raise
        raise RowError("unreadable_file", f"The file cannot be read: {error.strerror}.") from error


def _look_alike(path: str) -> str:
    """What may have been meant: paths written on Windows, and names that macOS writes in another Unicode form."""
    forms = (path.replace("\\", "/"), unicodedata.normalize("NFC", path), unicodedata.normalize("NFD", path))
    meant = next((form for form in forms if form != path and os.access(form, os.R_OK)), None)
    if meant is None:
        return ""
    how = "with slashes" if meant == forms[0] else "in another Unicode form"
    return f" There is one that is written {how}: {meant.encode('unicode_escape').decode()}."


def _read_regular_file(path: str) -> bytes:
    with open(path, "rb", buffering=0, opener=_open_without_waiting) as file:
        facts = os.fstat(file.fileno())
        if not stat.S_ISREG(facts.st_mode):
            raise RowError("unreadable_file", "It is no regular file.")
        if facts.st_size > MAX_FILE_BYTES:
            raise RowError("file_too_large", f"The file has {facts.st_size} bytes; at most {MAX_FILE_BYTES} are read.")
        return file.read()


def _open_without_waiting(path: str, flags: int) -> int:
    # Opening a pipe the plain way would wait for a writer for ever. Windows has no such flag.
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _holds(file: str, data: bytes) -> bool:
    try:
        return os.stat(file).st_size == len(data) and Path(file).read_bytes() == data
    except FileNotFoundError:
        return False
