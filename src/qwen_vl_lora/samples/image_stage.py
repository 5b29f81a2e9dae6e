"""The stage: a collection checks pictures and stores their bytes here before `images` is saved.

Reads only below allowed folders, decodes each distinct picture once for any number of rows, and is
thread-safe. Knows nothing of rows.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import stat
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from qwen_vl_lora.hub.fetching import FetchError
from qwen_vl_lora.pages.page import picture_data
from qwen_vl_lora.parameters import ImageParameters
from qwen_vl_lora.runs.artifacts import relative
from qwen_vl_lora.runs.storage import temporary, temporary_name
from qwen_vl_lora.samples.checked_pictures import CheckedPictures
from qwen_vl_lora.samples.image_files import ImageFacts, inspect_image, open_image
from qwen_vl_lora.samples.image_store import ImageEntry
from qwen_vl_lora.samples.look_alikes import LookAlikes
from qwen_vl_lora.samples.records import Address, Reason, Reference, RowError
from qwen_vl_lora.samples.workspace import Workspace

MAX_FILE_BYTES = 256 * 2**20
"""Size of the largest encoded picture that is read into memory."""

MAX_THUMBNAILS, THUMBNAIL_SIDE = 200, 224
"""Pictures of rejected rows that are kept for the data page, and their longest side in px."""

_NOT_THE_FILES_FAULT = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""Errors of an exhausted machine: they must not reject a row, which may be good."""

FETCHED_FOLDER = "fetched"
"""Folder below the stage with a note for each fetched URL: the name of its file in the store."""

Fetch = Callable[[str], bytes]
"""Returns the bytes behind a URL, or raises `FetchError`."""

_STORED_NAME = re.compile(r"[0-9a-f]{64}\.[a-z]+")
_REASONS: dict[str, Reason] = {"refused": "url_not_allowed", "too_large": "file_too_large", "failed": "missing_image"}


@dataclass(frozen=True, slots=True)
class DataFolders:
    """The folders that a collection must know to name a picture's final place.

    Attributes:
        files: where the bytes will lie once `images` is saved.
        stage: where they lie until then.
    """

    project: Path
    files: Path
    stage: Path

    @classmethod
    def of(cls, workspace: Workspace) -> DataFolders:
        return cls(workspace.project, workspace.images, workspace.path / "images")


class Picture(NamedTuple):
    """A distinct picture on the stage. Kept small, because there is one for every picture of a run."""

    sha256: str
    suffix: str
    width: int
    height: int
    num_bytes: int
    look: bytes
    is_plain: bool
    source: str = ""
    modified: int = 0
    """Both as in `ImageEntry`."""


class _Fault(NamedTuple):
    """A fault without the traceback of its exception, which would keep the picture's bytes in memory."""

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
        *,
        writes: bool = True,
    ) -> None:
        """Allow `source_folders` besides the project and `image.allowed_roots`; without `fetch` no URL is fetched.

        Without `writes` pictures are checked, but nothing is written.
        """
        self._writes = writes
        self._refers = limits.storage == "reference"
        self._seen: dict[str, tuple[int, int]] = {}
        """Size and time of change of files that are referred to, when they were read."""
        self._num_thumbnails = 0
        self._fetch = fetch
        self._address_locks: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
        self._folders = folders
        self._content_folder = relative(folders.files, folders.project)
        self._limits = limits
        self._allowed_roots = readable_roots(folders.project, source_folders, limits)
        self._look_alikes = LookAlikes(source_folders)
        self._lock = threading.Lock()
        self._by_content: dict[str, Picture | _Fault | Exception | threading.Event] = {}
        self._by_place: dict[str, Picture | _Fault] = {}
        self._checked = CheckedPictures(folders.stage, limits) if writes else None
        self._stage_folder, self._files_folder = str(folders.stage), str(folders.files)
        if writes:
            folders.stage.mkdir(parents=True, exist_ok=True)

    def add(self, image: Reference) -> Picture:
        """Check a picture and stage its bytes.

        Raises:
            RowError: when it cannot be read or used.
            OSError: when its bytes cannot be written; the next run uses what was staged so far.
        """
        if isinstance(image, bytes):
            outcome = self._add_bytes(image)
        else:
            outcome = self._add_address(image.url) if isinstance(image, Address) else self._add_file(str(image))
        if isinstance(outcome, _Fault):
            raise RowError(outcome.reason, outcome.detail)
        return outcome

    @property
    def fetches(self) -> bool:
        """Whether pictures may be fetched by URL."""
        return self._fetch is not None

    def save_checked(self) -> None:
        """Keep what is known of the pictures, for a run that is killed from now on."""
        if self._checked is not None:
            self._checked.save()

    def finish(self) -> None:
        """Keep what is known of the pictures until the run has finished."""
        self.save_checked()
        if self._checked is not None:
            self._checked.forget_at_end()

    def thumbnail(self, image: Reference) -> str | None:
        """A small picture of what is not staged, as a data URI: of a rejected row whose picture is no fault.

        None if it cannot be shown, is not on this machine, or MAX_THUMBNAILS were made.
        """
        if self._num_thumbnails >= MAX_THUMBNAILS or not self._writes:
            return None
        self._num_thumbnails += 1
        try:
            if isinstance(image, Address):
                data = self._read_fetched(image.url) or b""
            else:
                data = image if isinstance(image, bytes) else read_allowed_file(str(image), self._allowed_roots)
            facts = inspect_image(data, self._limits)
            return picture_data(open_image(data, max_pixels=facts.width * facts.height), THUMBNAIL_SIDE)
        except (RowError, OSError):
            return None

    def entry(self, image_id: str, picture: Picture) -> ImageEntry:
        """Return the manifest entry of a picture."""
        return ImageEntry(
            image_id,
            picture.sha256,
            self._content_folder,
            picture.suffix,
            picture.width,
            picture.height,
            picture.num_bytes,
            picture.source,
            picture.modified,
        )

    def _add_address(self, url: str) -> Picture | _Fault:
        with self._lock:
            lock = self._address_locks[url]
        with lock:  # rows that share a picture are often adjacent: one fetches, the others wait
            known = self._by_place.get(url)
            if known is not None:
                return known
            added = self._add_new(url, lambda: self._read_address(url))
            if not isinstance(added, _Fault):
                self._note_fetched(url, added)
            return added

    def _add_file(self, path: str) -> Picture | _Fault:
        known = self._by_place.get(path)
        if known is None:
            refers = self._refers and _is_text(path)
            if refers and (seen := _size_and_time(path)):  # before it is read: a change during that is noticed later
                self._seen[path] = seen
            return self._add_new(path, lambda: read_allowed_file(path, self._allowed_roots, self._look_alikes))
        if isinstance(known, _Fault) or path not in self._seen or self._seen[path] == _size_and_time(path):
            return known
        return self._read_again(path, known)

    def _read_again(self, path: str, known: Picture) -> Picture | _Fault:
        """Hash a file whose size or time changed since an earlier row."""
        seen = _size_and_time(path)
        try:
            data = read_allowed_file(path, self._allowed_roots)
        except RowError as fault:
            return _Fault(fault.reason, f"{path}: {fault.detail}")
        if hashlib.sha256(data).hexdigest() != known.sha256:
            return _Fault("changed_image", f"{path}: The file changed since an earlier row named it. Run again.")
        if seen:
            self._seen[path] = seen
        return known

    def _add_new(self, place: str, read: Callable[[], bytes]) -> Picture | _Fault:
        try:
            added = self._add_bytes(read(), place)
        except RowError as fault:
            added = _Fault(fault.reason, fault.detail)
        if isinstance(added, _Fault):
            added = added._replace(detail=f"{place}: {added.detail}")
        self._by_place[place] = added
        return added

    def _read_address(self, address: str) -> bytes:
        """Return the bytes behind a URL: from the store if an earlier run fetched them, else from the network."""
        if self._fetch is None:
            raise RowError(
                "url_not_allowed",
                "This is a URL, and URLs are not fetched here. A run with image.allow_urls: true and the host in "
                "image.url_hosts fetches it.",
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
        unfinished = temporary(note)
        with contextlib.suppress(OSError):  # without its note the picture is only fetched once more
            note.parent.mkdir(exist_ok=True)
            unfinished.write_text(f"{picture.sha256}{picture.suffix}", encoding="ascii")
            unfinished.replace(note)

    def _add_bytes(self, data: bytes, place: str = "") -> Picture | _Fault:
        sha256 = hashlib.sha256(data).hexdigest()
        with self._lock:
            known = self._by_content.setdefault(sha256, waiting := threading.Event())
        if known is waiting:
            return self._inspect(data, sha256, waiting, place)
        if isinstance(known, threading.Event):
            known.wait()  # another thread is checking this picture, so this cannot block forever
            known = self._by_content[sha256]
        if isinstance(known, Exception):  # a failure of that thread fails this one too
            raise known
        assert not isinstance(known, threading.Event)
        return known

    def _inspect(self, data: bytes, sha256: str, waiting: threading.Event, place: str) -> Picture | _Fault:
        try:
            facts = self._facts(data, sha256)
            source, modified = ("", 0) if place not in self._seen else (os.path.realpath(place), self._seen[place][1])
            if self._writes and not source:
                self._stage(data, f"{sha256}{facts.suffix}")
            outcome: Picture | _Fault = Picture(
                sha256,
                facts.suffix,
                facts.width,
                facts.height,
                len(data),
                facts.look,
                facts.is_plain,
                source,
                modified,
            )
            self._by_content[sha256] = outcome
        except RowError as fault:
            outcome = self._by_content[sha256] = _Fault(fault.reason, fault.detail)
        except Exception as error:
            self._by_content[sha256] = error
            raise
        finally:
            waiting.set()
        return outcome

    def _facts(self, data: bytes, sha256: str) -> ImageFacts:
        """Decode a picture, unless an unfinished run did."""
        facts = None if self._checked is None else self._checked.get(sha256)
        if facts is not None:
            return facts
        facts = inspect_image(data, self._limits)
        if self._checked is not None:
            self._checked.add(sha256, facts)
        return facts

    def _stage(self, data: bytes, name: str) -> None:
        """Write the bytes unless equal bytes are staged or stored already."""
        staged = f"{self._stage_folder}/{name}"
        if _holds(f"{self._files_folder}/{name}", data) or _holds(staged, data):
            return
        unfinished = f"{self._stage_folder}/{temporary_name(name)}"  # two runs may share a workspace
        try:
            Path(unfinished).write_bytes(data)
            os.replace(unfinished, staged)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(unfinished)
            raise


def readable_roots(project: Path, folders: Sequence[Path], image: ImageParameters) -> tuple[str, ...]:
    """Return the resolved folders whose pictures may be read: the project, `folders` and `image.allowed_roots`."""
    allowed = (project, *folders, *(project / Path(root).expanduser() for root in image.allowed_roots))
    return tuple(dict.fromkeys(os.path.realpath(root) for root in allowed))


def read_allowed_file(path: str, allowed_roots: Sequence[str], look_alikes: LookAlikes | None = None) -> bytes:
    """Read a picture file whose path, with links resolved, is below one of the folders.

    Args:
        look_alikes: suggests a similar file for a path that does not exist.

    Raises:
        RowError: `outside_allowed_roots`, `missing_image`, `unreadable_file` or `file_too_large`.
    """
    try:
        real = os.path.realpath(path)
        if not any(real.startswith(f"{root.rstrip(os.sep)}{os.sep}") for root in allowed_roots):
            if not os.path.lexists(real):  # allowing a folder would not help
                raise FileNotFoundError(real)
            raise RowError(
                "outside_allowed_roots",
                f"The file is outside the folders that may be read ({', '.join(allowed_roots)}). "
                f"To allow it, add its folder to image.allowed_roots: [{Path(real).parent}].",
            )
        return _read_regular_file(real)
    except RowError:
        raise
    except (FileNotFoundError, NotADirectoryError) as error:
        hint = "" if look_alikes is None else look_alikes.hint(path)
        raise RowError("missing_image", f"File not found.{hint}") from error
    except ValueError as error:  # a NUL in the name
        raise RowError("missing_image", f"Invalid file name: {error}.") from error
    except OSError as error:
        if error.errno in _NOT_THE_FILES_FAULT:
            raise
        raise RowError("unreadable_file", f"The file cannot be read: {error.strerror}.") from error


def _read_regular_file(path: str) -> bytes:
    with open(path, "rb", buffering=0, opener=_open_without_waiting) as file:
        facts = os.fstat(file.fileno())
        if not stat.S_ISREG(facts.st_mode):
            raise RowError("unreadable_file", "Not a regular file.")
        if facts.st_size > MAX_FILE_BYTES:
            raise RowError("file_too_large", f"The file has {facts.st_size} bytes; at most {MAX_FILE_BYTES} are read.")
        return file.read()


def _open_without_waiting(path: str, flags: int) -> int:
    # Without this flag, opening a pipe waits for a writer forever. Windows has no such flag.
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _size_and_time(path: str) -> tuple[int, int] | None:
    """Return bytes and time of the last change in nanoseconds; None if the file cannot be asked."""
    try:
        facts = os.stat(path)
    except (OSError, ValueError):
        return None
    return facts.st_size, facts.st_mtime_ns


def _is_text(path: str) -> bool:
    """Whether a manifest can hold the path, and its resolved form: a file name may be any bytes."""
    try:
        os.path.realpath(path).encode()
    except ValueError:
        return False
    return True


def _holds(file: str, data: bytes) -> bool:
    try:
        return os.stat(file).st_size == len(data) and Path(file).read_bytes() == data
    except FileNotFoundError:
        return False
