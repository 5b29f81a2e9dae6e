"""Snapshots of base models: downloaded completely, verified, and used without a network from then on.

    <folder>/                 the files of a revision
    <folder>.manifest.json    path, size, sha256 of each, written last

The folder is `<MODELSCOPE_CACHE>/models/<owner>--<name>/snapshots/<revision>`, the client's own, or
`<HF_HOME>/qwen-vl-lora/models/<owner>--<name>/<revision>`, apart from the client's cache, whose files are links.

A manifest lists files that were hashed against the hub's listing. Later checks compare sizes and
modification times, and hash a file again if its time changed. A revision with a manifest is not
requested again, so a branch that moved on the hub does not change the base model of a run.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import shutil
import stat
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

from qwen_vl_lora.exceptions import BaseModelError, MissingArtifactError
from qwen_vl_lora.hub import hugging_face
from qwen_vl_lora.hub.repositories import (
    ListedFile,
    Repository,
    download_verified,
    fault_of,
    hub_config,
    hub_faults,
    list_files,
    require_reachable,
)
from qwen_vl_lora.runs.storage import file_sha256, temporary

logger = logging.getLogger(__name__)

SUFFIXES = (".json", ".txt", ".jinja", ".model", ".safetensors")
"""Files that a base model is loaded from: no pickles, no code, no pictures of the model card."""

_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_REMEDY = (
    "Connect once and run again, or copy the model's folder to this machine and give its path: "
    '--params "base_model=path/to/folder" (no folder of this name was found).'
)


@dataclass(frozen=True)
class KeptFile:
    """One line of the manifest."""

    path: str
    size: int
    sha256: str
    mtime_ns: int


class Snapshot(ABC):
    """One model at one revision, downloaded or not."""

    cache_variable: ClassVar[str]
    """Environment variable that moves the folder."""

    def __init__(self, repository: Repository) -> None:
        self.repository = repository

    @property
    @abstractmethod
    def folder(self) -> Path:
        """Folder of this revision."""

    @abstractmethod
    def _require_reachable(self) -> None:
        """Check that the hub responds. Raises: MissingArtifactError within seconds, with a remedy."""

    @abstractmethod
    def _list_files(self) -> tuple[str, list[ListedFile]]:
        """Return the commit to download from and the files that it lists, with checked names."""

    @abstractmethod
    def _download(self, commit: str, files: Sequence[ListedFile]) -> None:
        """Download into the folder what is not there already, resuming. Raises: MissingArtifactError."""

    @property
    def manifest(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.manifest.json")

    @property
    def _path_parts(self) -> tuple[str, str]:
        """Names of two folders, for the repository and its revision."""
        return self.repository.id.replace("/", "--"), self.repository.revision.replace("/", "--")

    def check(self) -> None:
        """Check that the snapshot is complete or can be downloaded. Downloads nothing.

        Raises:
            MissingArtifactError: when the snapshot is incomplete and the hub cannot be reached.
        """
        if not self.is_whole():
            self._require_reachable()

    def is_whole(self) -> bool:
        """Whether a verified snapshot exists and has not changed."""
        return self.faults() == []

    def faults(self) -> list[str] | None:
        """Return the faults of a verified snapshot, file by file; None if no snapshot was verified."""
        kept = self._read_manifest()
        if kept is None:
            return None
        looked_at = [_look_at(self.folder / file.path, file) for file in kept]
        if not any(fault for fault, _ in looked_at) and [file for _, file in looked_at] != kept:
            with contextlib.suppress(OSError):  # on read-only storage the files are hashed again next time
                self._write_manifest([file for _, file in looked_at])
        return [fault for fault, _ in looked_at if fault]

    def fetch(self) -> Path:
        """Return the folder of a complete snapshot; download or repair it if needed.

        Raises:
            MissingArtifactError: when the hub does not have it, or it cannot be downloaded completely.
            BaseModelError: when it is not usable as a base model.
        """
        faults = self.faults()
        if faults == []:
            return self.folder
        if faults:
            logger.warning("%s in %s: %s. Fetching again.", self.repository, self.folder, ", ".join(faults))
        self._require_reachable()
        commit, listed = self._list_files()
        files = _choose(self.repository, listed)
        self._require_space(files)
        small = [file for file in files if not file.name.endswith(".safetensors")]
        self._download(commit, small)
        self._refuse_remote_code()  # before the gigabytes
        self._download(commit, files)
        self._write_manifest(self._verify(files))
        return self.folder

    def _refuse_remote_code(self) -> None:
        try:
            config = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        except ValueError as error:
            raise BaseModelError(f"config.json of {self.repository} is not valid JSON: {error}.") from error
        if "auto_map" in config:
            raise BaseModelError(
                f"Base model {self.repository} asks for its own code (auto_map in config.json), which is never run. "
                "No weights were downloaded. Use a checkpoint of its plain architecture."
            )

    def _require_space(self, files: Sequence[ListedFile]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        wanted = sum(file.size for file in files if not (self.folder / file.name).exists())
        free = shutil.disk_usage(self.folder).free
        if wanted > free:
            raise MissingArtifactError(
                f"{self.repository} needs {wanted / 2**30:.1f} GiB in {self.folder}, {free / 2**30:.1f} GiB are free. "
                f"Free some space, or set {self.cache_variable} to another disk."
            )

    def _verify(self, files: Sequence[ListedFile]) -> list[KeptFile]:
        with ThreadPoolExecutor() as pool:
            kept = list(pool.map(lambda file: _keep(self.folder / file.name), files))
        altered = [
            file.name
            for file, found in zip(files, kept, strict=True)
            if (found.sha256 != file.sha256 if file.sha256 else fault_of(self.folder / file.name, file))
        ]
        if altered:
            raise BaseModelError(
                f"{', '.join(altered)} of {self.repository} in {self.folder} differ from the hub's listing. "
                "Repeat the command to download them again."
            )
        return kept

    def _read_manifest(self) -> list[KeptFile] | None:
        try:
            tree = json.loads(self.manifest.read_text(encoding="utf-8"))
            return [KeptFile(**file) for file in tree["files"]]
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError):
            logger.warning("Cannot read the manifest %s; verifying the snapshot again.", self.manifest)
            return None

    def _write_manifest(self, kept: Sequence[KeptFile]) -> None:
        tree = {
            "id": self.repository.id,
            "revision": self.repository.revision,
            "files": [asdict(file) for file in kept],
        }
        unfinished = temporary(self.manifest)
        unfinished.write_text(json.dumps(tree, indent=1), encoding="utf-8")
        unfinished.replace(self.manifest)


class ModelScopeSnapshot(Snapshot):
    """A model of a ModelScope hub, downloaded by the client's own `snapshot_download`."""

    cache_variable = "MODELSCOPE_CACHE"

    @property
    def folder(self) -> Path:
        model, revision = self._path_parts
        return Path(hub_config().cache_dir).absolute() / "models" / model / "snapshots" / revision

    def _require_reachable(self) -> None:
        require_reachable(self.repository, _REMEDY)

    def _list_files(self) -> tuple[str, list[ListedFile]]:
        return self.repository.revision, list_files(self.repository)

    def _download(self, commit: str, files: Sequence[ListedFile]) -> None:
        from modelscope.hub.snapshot_download import snapshot_download

        for file in files:  # the client would write through the link
            target = self.folder / file.name
            if target.is_symlink():
                target.unlink()
        with hub_faults(self.repository):
            # Only checked names: a listing that changes between two requests cannot add files.
            snapshot_download(
                self.repository.id,
                revision=commit,
                local_dir=str(self.folder),
                endpoint=hub_config().endpoint,  # otherwise the client keeps the first endpoint that it sees
                allow_patterns=[file.name for file in files],
            )


class HuggingFaceSnapshot(Snapshot):
    """A model of a Hugging Face hub, downloaded file by file and hashed against the listing of one commit."""

    cache_variable = "HF_HOME"

    @property
    def folder(self) -> Path:
        model, revision = self._path_parts
        return hugging_face.home("model").absolute() / model / revision

    def _require_reachable(self) -> None:
        hugging_face.require_reachable(self.repository, _REMEDY)

    def _list_files(self) -> tuple[str, list[ListedFile]]:
        return hugging_face.list_files(self.repository)

    def _download(self, commit: str, files: Sequence[ListedFile]) -> None:
        for file in files:

            def download(anew: bool, file: ListedFile = file) -> None:
                hugging_face.download(self.repository, commit, file, self.folder, anew=anew)

            if fault := download_verified(self.folder / file.name, file, download):
                raise MissingArtifactError(
                    f"{self.repository} was not downloaded completely: {file.name}: {fault}. Downloaded parts are "
                    "kept; repeat the command to resume."
                )


def snapshot_of(repository: Repository) -> Snapshot:
    """Return the snapshot of a model on either hub."""
    kind = HuggingFaceSnapshot if repository.hub == "hf" else ModelScopeSnapshot
    return kind(repository)


def _choose(repository: Repository, files: Sequence[ListedFile]) -> list[ListedFile]:
    """Select the files that a base model is loaded from.

    Raises:
        BaseModelError: when the repository is not a model, or has only pickles.
    """
    chosen = [file for file in files if file.name.endswith(SUFFIXES) and _FILE_NAME.fullmatch(file.name)]
    names = {file.name for file in chosen}
    if "config.json" not in names:
        raise BaseModelError(f"{repository} has no config.json, so it is not a transformers model.")
    if not any(name.endswith(".safetensors") for name in names):
        pickles = sorted(file.name for file in files if file.name.endswith((".bin", ".pt", ".pth", ".ckpt")))
        raise BaseModelError(
            f"{repository} has no *.safetensors ({', '.join(pickles) or 'and no other weights'}). Pickle files can "
            "run code when loaded and are not read; use a checkpoint with safetensors."
        )
    return chosen


def _look_at(path: Path, known: KeptFile) -> tuple[str, KeptFile]:
    """Return a fault or an empty text, and the current facts of the file."""
    try:
        facts = path.lstat()
    except OSError:
        return f"{known.path} is missing", known
    if not stat.S_ISREG(facts.st_mode):
        return f"{known.path} is not a plain file", known
    if facts.st_size != known.size:
        return f"{known.path} has {facts.st_size} bytes, expected {known.size}", known
    if facts.st_mtime_ns != known.mtime_ns:
        known_now = _keep(path)
        return ("" if known_now.sha256 == known.sha256 else f"{known.path} was altered"), known_now
    return "", known


def _keep(path: Path) -> KeptFile:
    facts = path.stat()
    return KeptFile(path.name, facts.st_size, file_sha256(path), facts.st_mtime_ns)
