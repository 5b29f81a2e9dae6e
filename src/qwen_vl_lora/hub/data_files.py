"""Data sets of the Hugging Face and ModelScope hubs as files: listed once, fetched one by one, verified, then offline.

    <home>/<owner>--<name>/<revision>/                  the files, under their names on the hub
    <home>/<owner>--<name>/<revision>.listing.json      what the hub listed: name, size and hash of each file
    <home>/<owner>--<name>/<revision>.verified.jsonl    a line for each file that was hashed against it

A revision that was listed is not requested again, so a branch that moves on the hub does not change the data of a
run. To take a newer state, delete the folder and both files. Knows nothing of captions; runs no code of a data set.
"""

from __future__ import annotations

import json
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from qwen_vl_lora.exceptions import DataFormatError, MissingArtifactError
from qwen_vl_lora.hub import hugging_face
from qwen_vl_lora.hub.repositories import (
    DEFAULT_REVISIONS,
    ListedFile,
    Repository,
    download_verified,
    hub_config,
    hub_faults,
    list_files,
)
from qwen_vl_lora.runs.storage import temporary

_NAME = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"
_PLACE = re.compile(rf"(?P<hub>hf|ms):(?P<id>{_NAME}/{_NAME})(@(?P<revision>{_NAME}(/{_NAME})*))?(:(?P<below>.+))?")


@dataclass(frozen=True)
class DataRepository(ABC):
    """A data set on a hub at one revision: a branch, a tag or a commit."""

    id: str
    revision: str

    hub: ClassVar[str]

    def __str__(self) -> str:
        return f"{self.hub}:{self.id}@{self.revision}"

    @property
    @abstractmethod
    def home(self) -> Path:
        """Folder for the files of this hub."""

    @property
    def folder(self) -> Path:
        """Folder of the files of this revision."""
        return self.home.absolute() / self.id.replace("/", "--") / self.revision.replace("/", "--")

    def open(self) -> HubFolder:
        """Return the files of this revision. The hub is asked for the listing only once.

        Raises:
            MissingArtifactError: when the hub does not have the revision or does not respond.
            DataFormatError: when a name in the listing leads outside the folder.
        """
        listing = self.folder.with_name(f"{self.folder.name}.listing.json")
        stored = _read_listing(listing)
        if stored is None:
            commit, files = self.list_files()
            stored = commit, [file for file in files if not _is_hidden(file.name)]
            _write_listing(listing, self, *stored)
        return HubFolder(self, *stored)

    @abstractmethod
    def list_files(self) -> tuple[str, list[ListedFile]]:
        """Return the commit that the revision resolves to now, and its files. Raises: MissingArtifactError."""

    @abstractmethod
    def download(self, commit: str, file: ListedFile, *, anew: bool) -> None:
        """Download a file into `folder`, resuming a broken download. Raises: MissingArtifactError.

        Args:
            anew: discard what the client already has of the file.
        """

    @abstractmethod
    def require_reachable(self) -> None:
        """Check that the hub responds. Raises: MissingArtifactError within seconds."""


class HubFolder:
    """The folder of a data set, whose files are downloaded on demand."""

    def __init__(self, repository: DataRepository, commit: str, files: Sequence[ListedFile]) -> None:
        self.repository = repository
        self.folder = repository.folder
        self._commit = commit
        self._files = {self.folder / file.name: file for file in files}
        self._notes = self.folder.with_name(f"{self.folder.name}.verified.jsonl")
        self._verified = dict(_read_notes(self._notes))

    @property
    def paths(self) -> list[Path]:
        """Paths of the listed files, downloaded or not."""
        return list(self._files)

    def holds(self, path: Path) -> bool:
        """Whether a path belongs to a listed file."""
        return path in self._files

    def is_here(self, path: Path) -> bool:
        """Whether a file was downloaded and verified, and has not changed since."""
        try:
            facts = path.lstat()
        except OSError:
            return False
        name = self._files[path].name
        return not path.is_symlink() and self._verified.get(name) == (facts.st_size, facts.st_mtime_ns)

    def bring(self, path: Path) -> None:
        """Download a listed file unless it is there and verified. A path that is not listed is ignored.

        Raises:
            MissingArtifactError: when it cannot be downloaded completely.
        """
        file = self._files.get(path)
        if file is None or self.is_here(path):
            return

        def download(anew: bool) -> None:
            self._require_space(file)
            self.repository.download(self._commit, file, anew=anew)

        fault = download_verified(path, file, download)
        if fault is not None:
            raise MissingArtifactError(
                f"{file.name} of {self.repository} differs from the hub's listing: {fault}. Repeat the command later. "
                f"If the data set changed on the hub, delete {self.folder} and {self.folder.name}.listing.json "
                "beside it."
            )
        self._note(path, file)

    def _note(self, path: Path, file: ListedFile) -> None:
        facts = path.stat()
        self._verified[file.name] = (facts.st_size, facts.st_mtime_ns)
        with self._notes.open("a", encoding="utf-8") as notes:
            notes.write(json.dumps([file.name, facts.st_size, facts.st_mtime_ns]) + "\n")

    def _require_space(self, file: ListedFile) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        if file.size > free:
            raise MissingArtifactError(
                f"{file.name} of {self.repository} needs {file.size / 2**30:.1f} GiB in {self.folder}; "
                f"{free / 2**30:.1f} GiB are free. Free some space, or move the hub's cache to another disk."
            )


@dataclass(frozen=True)
class HuggingFaceData(DataRepository):
    """A data set on the Hugging Face hub, or on the hub at `HF_ENDPOINT`."""

    hub = "hf"

    @property
    def home(self) -> Path:
        return hugging_face.home("dataset")

    @property
    def _repository(self) -> Repository:
        return Repository("dataset", self.id, self.revision, "hf")

    def list_files(self) -> tuple[str, list[ListedFile]]:
        return hugging_face.list_files(self._repository)

    def download(self, commit: str, file: ListedFile, *, anew: bool) -> None:
        hugging_face.download(self._repository, commit, file, self.folder, anew=anew)

    def require_reachable(self) -> None:
        hugging_face.require_reachable(self._repository)


@dataclass(frozen=True)
class ModelScopeData(DataRepository):
    """A data set on a ModelScope hub, read as files; `hub.tables` reads those that are scripts."""

    hub = "ms"

    @property
    def home(self) -> Path:
        return Path(hub_config().cache_dir) / "qwen-vl-lora" / "datasets"

    @property
    def _repository(self) -> Repository:
        return Repository("dataset", self.id, self.revision)

    def list_files(self) -> tuple[str, list[ListedFile]]:
        self.require_reachable()
        return self.revision, list_files(self._repository)

    def download(self, commit: str, file: ListedFile, *, anew: bool) -> None:
        from modelscope_hub import HubApi
        from modelscope_hub.errors import FileIntegrityError

        with hub_faults(self._repository):
            try:
                HubApi(endpoint=hub_config().endpoint).download_file(
                    self.id,
                    "dataset",
                    file.name,
                    revision=commit,
                    local_dir=self.folder,
                    expected_sha256=file.sha256 or None,
                    file_size=file.size,
                    force=anew,
                )
            except FileIntegrityError:
                return  # the client removed the file, so `bring` finds none

    def require_reachable(self) -> None:
        from qwen_vl_lora.hub.repositories import require_reachable

        require_reachable(self._repository, "Connect and run again; downloaded files are kept.")


def parse_data_place(text: str) -> tuple[DataRepository, str] | None:
    """Parse `hf:owner/name` or `ms:owner/name`, each with optional `@revision` and `:path/below`; None for other texts.

    Raises:
        DataFormatError: for a text with such a prefix and another form.
    """
    if not text.startswith(("hf:", "ms:")):
        return None
    found = _PLACE.fullmatch(text)
    if found is None:
        raise DataFormatError(
            f"captions_file: expected {text[:3]}owner/name, {text[:3]}owner/name@revision or "
            f"{text[:3]}owner/name@revision:path/in/it; got {text!r}."
        )
    below = (found["below"] or "").strip("/")
    if ".." in below.split("/"):
        raise DataFormatError(f"captions_file: the path in {text!r} must stay inside the data set.")
    if found["hub"] == "hf":
        return HuggingFaceData(found["id"], found["revision"] or DEFAULT_REVISIONS["hf"]), below
    return ModelScopeData(found["id"], found["revision"] or DEFAULT_REVISIONS["ms"]), below


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _read_listing(file: Path) -> tuple[str, list[ListedFile]] | None:
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
        return str(tree["commit"]), [ListedFile(**entry) for entry in tree["files"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # the hub is asked for the listing again


def _write_listing(file: Path, repository: DataRepository, commit: str, files: Sequence[ListedFile]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    tree = {"dataset": str(repository), "commit": commit, "files": [asdict(entry) for entry in files]}
    unfinished = temporary(file)
    unfinished.write_text(json.dumps(tree, indent=1), encoding="utf-8")
    unfinished.replace(file)


def _read_notes(file: Path) -> Iterator[tuple[str, tuple[int, int]]]:
    if not file.is_file():
        return
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            note: Any = json.loads(line)
            name, size, mtime_ns = note
        except (ValueError, TypeError):
            continue  # a killed run left the line incomplete: the file is hashed again
        yield name, (size, mtime_ns)
