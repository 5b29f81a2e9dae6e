"""Snapshots of base models: whole, verified, and used without a network from then on.

    <cache>/models/<owner>--<name>/snapshots/<revision>/                 the files, where the client itself keeps them
    <cache>/models/<owner>--<name>/snapshots/<revision>.manifest.json    ours: path, size, sha256 of each, written last

A manifest stands for files that were hashed against the hub's listing. Later only sizes and time
stamps are looked at, and a file whose time stamp moved is hashed again. A revision whose manifest is
there is never asked for again: a branch that moved on the hub does not move a base model under a run.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import stat
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from qwen_vl_lora.exceptions import BaseModelError, MissingArtifactError
from qwen_vl_lora.hub.repositories import (
    ListedFile,
    Repository,
    file_sha256,
    hub_config,
    hub_faults,
    list_files,
    require_reachable,
)

logger = logging.getLogger(__name__)

SUFFIXES = (".json", ".txt", ".jinja", ".model", ".safetensors")
"""What a base model is loaded from. No pickles, no code, no pictures of the model card."""

_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_REMEDY = (
    "Connect once and run again, or copy the model's folder here and give its path: "
    '--params "base_model=path/to/folder" (no folder of this name is there).'
)


@dataclass(frozen=True)
class KeptFile:
    """A line of the manifest."""

    path: str
    size: int
    sha256: str
    mtime_ns: int


class Snapshot:
    """One model at one revision on this machine, or not yet."""

    def __init__(self, repository: Repository) -> None:
        self.repository = repository

    @property
    def folder(self) -> Path:
        """Where the client keeps this revision."""
        root = Path(hub_config().cache_dir) / "models" / self.repository.id.replace("/", "--")
        return root.absolute() / "snapshots" / self.repository.revision

    @property
    def manifest(self) -> Path:
        return self.folder.with_name(f"{self.repository.revision}.manifest.json")

    def check(self) -> None:
        """Whether a fetch can succeed at all. Downloads nothing.

        Raises:
            MissingArtifactError: when the snapshot is not whole and the hub cannot be reached.
        """
        if not self.is_whole():
            require_reachable(self.repository, _REMEDY)

    def is_whole(self) -> bool:
        """Whether a verified snapshot is there and still what it was."""
        return self.faults() == []

    def faults(self) -> list[str] | None:
        """What is wrong with a verified snapshot, file by file; None when none was ever verified."""
        kept = self._read_manifest()
        if kept is None:
            return None
        looked_at = [_look_at(self.folder / file.path, file) for file in kept]
        if not any(fault for fault, _ in looked_at) and [file for _, file in looked_at] != kept:
            with contextlib.suppress(OSError):  # on read-only storage it is whole too, and hashed again next time
                self._write_manifest([file for _, file in looked_at])
        return [fault for fault, _ in looked_at if fault]

    def fetch(self) -> Path:
        """Return the folder of a whole snapshot; download or repair it when it is not.

        Raises:
            MissingArtifactError: when the hub does not have it, or does not give it whole.
            BaseModelError: when it cannot be a base model here.
        """
        faults = self.faults()
        if faults == []:
            return self.folder
        if faults:
            logger.warning("%s in %s: %s. Fetching again.", self.repository, self.folder, ", ".join(faults))
        require_reachable(self.repository, _REMEDY)
        files = _choose(self.repository, list_files(self.repository))
        self._require_space(files)
        small = [file for file in files if not file.name.endswith(".safetensors")]
        self._download(small)
        self._refuse_remote_code()  # before the gigabytes
        self._download(files)
        self._write_manifest(self._verify(files))
        return self.folder

    def _download(self, files: Sequence[ListedFile]) -> None:
        from modelscope.hub.snapshot_download import snapshot_download

        for file in files:  # the client would write through a link
            target = self.folder / file.name
            if target.is_symlink():
                target.unlink()
        with hub_faults(self.repository):
            # Only names that were checked: a listing that changes between two requests brings nothing new.
            snapshot_download(
                self.repository.id,
                revision=self.repository.revision,
                local_dir=str(self.folder),
                endpoint=hub_config().endpoint,  # the client keeps the first one it sees otherwise
                allow_patterns=[file.name for file in files],
            )

    def _refuse_remote_code(self) -> None:
        try:
            config = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        except ValueError as error:
            raise BaseModelError(f"config.json of {self.repository} is no JSON: {error}.") from error
        if "auto_map" in config:
            raise BaseModelError(
                f"Base model {self.repository} asks for its own code (auto_map in config.json), which is never run "
                "here. No weights were downloaded. Use a checkpoint of the plain Qwen2-VL or Qwen2.5-VL architecture."
            )

    def _require_space(self, files: Sequence[ListedFile]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        wanted = sum(file.size for file in files if not (self.folder / file.name).exists())
        free = shutil.disk_usage(self.folder).free
        if wanted > free:
            raise MissingArtifactError(
                f"{self.repository} needs {wanted / 2**30:.1f} GiB in {self.folder}, {free / 2**30:.1f} GiB are free. "
                "Make room, or set MODELSCOPE_CACHE to another disk."
            )

    def _verify(self, files: Sequence[ListedFile]) -> list[KeptFile]:
        with ThreadPoolExecutor() as pool:
            kept = list(pool.map(lambda file: _keep(self.folder / file.name), files))
        altered = [
            file.name
            for file, found in zip(files, kept, strict=True)
            if found.size != file.size or (file.sha256 and found.sha256 != file.sha256)
        ]
        if altered:
            raise BaseModelError(
                f"{', '.join(altered)} of {self.repository} in {self.folder} are not what the hub lists. "
                "Start the same command again: they are fetched anew."
            )
        return kept

    def _read_manifest(self) -> list[KeptFile] | None:
        try:
            tree = json.loads(self.manifest.read_text(encoding="utf-8"))
            return [KeptFile(**file) for file in tree["files"]]
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError):
            logger.warning("The manifest %s cannot be read; the snapshot is verified again.", self.manifest)
            return None

    def _write_manifest(self, kept: Sequence[KeptFile]) -> None:
        tree = {
            "id": self.repository.id,
            "revision": self.repository.revision,
            "files": [asdict(file) for file in kept],
        }
        unfinished = self.manifest.with_name(f".{self.manifest.name}.{os.getpid()}")
        unfinished.write_text(json.dumps(tree, indent=1), encoding="utf-8")
        unfinished.replace(self.manifest)


def _choose(repository: Repository, files: Sequence[ListedFile]) -> list[ListedFile]:
    """The files that a base model is loaded from.

    Raises:
        BaseModelError: when the repository is no model, or holds pickles alone.
    """
    chosen = [file for file in files if file.name.endswith(SUFFIXES) and _FILE_NAME.fullmatch(file.name)]
    names = {file.name for file in chosen}
    if "config.json" not in names:
        raise BaseModelError(f"{repository} holds no config.json: it is no model of transformers.")
    if not any(name.endswith(".safetensors") for name in names):
        pickles = sorted(file.name for file in files if file.name.endswith((".bin", ".pt", ".pth", ".ckpt")))
        raise BaseModelError(
            f"{repository} holds no *.safetensors ({', '.join(pickles) or 'and no other weights'}). Pickle files can "
            "run code when loaded and are not read; take a checkpoint with safetensors."
        )
    return chosen


def _look_at(path: Path, known: KeptFile) -> tuple[str, KeptFile]:
    """A fault or an empty text, and the file as it is now."""
    try:
        facts = path.lstat()
    except OSError:
        return f"{known.path} is missing", known
    if not stat.S_ISREG(facts.st_mode):
        return f"{known.path} is no plain file", known
    if facts.st_size != known.size:
        return f"{known.path} has {facts.st_size} bytes in place of {known.size}", known
    if facts.st_mtime_ns != known.mtime_ns:
        known_now = _keep(path)
        return ("" if known_now.sha256 == known.sha256 else f"{known.path} was altered"), known_now
    return "", known


def _keep(path: Path) -> KeptFile:
    facts = path.stat()
    return KeptFile(path.name, facts.st_size, file_sha256(path), facts.st_mtime_ns)
