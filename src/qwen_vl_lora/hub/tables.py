"""Tables of captioned pictures on a ModelScope hub, read row by row with `MsDataset`.

The client prepares the texts of a table once, in its own cache. Pictures that a table names by URL are
fetched when a row is taken. Code that comes with a table runs only with the user's consent.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from qwen_vl_lora.exceptions import DataFormatError, MissingArtifactError, QwenVLLoraError
from qwen_vl_lora.hub.repositories import (
    ListedFile,
    Repository,
    hub_config,
    hub_faults,
    list_files,
    require_reachable,
)
from qwen_vl_lora.runs.storage import file_sha256

_REMEDY = (
    "Connect and run again, or use the official COCO files: qwen_vl_lora.datasets.sources.CocoCaptionsDataset "
    "in the catalog (docs/own-data.md)."
)

MAX_ATTEMPTS = 2
"""Attempts to prepare a table: the client does not verify what it downloaded."""


@dataclass(frozen=True)
class HubTable:
    """One split of one table at one revision.

    Attributes:
        subset: name of a configuration; None takes the only one.
        trust_remote_code: consent to run the Python file of a script dataset.
    """

    repository: Repository
    subset: str | None
    split: str
    trust_remote_code: bool

    def check(self) -> None:
        """Check that the table can be read from the hub.

        Raises:
            DataFormatError: when the client would read a local folder in place of the table.
            MissingArtifactError: within seconds, when the hub cannot be reached.
        """
        for name in (self.repository.id, self.repository.id.rpartition("/")[2]):
            if Path(name).exists():
                raise DataFormatError(
                    f"{Path(name).absolute()} exists, and ModelScope's client would read it in place of the dataset "
                    f"{self.repository}. Rename it, or use it as the source: give its captions file as captions_file "
                    "(docs/own-data.md)."
                )
        require_reachable(self.repository, _REMEDY)

    def open(self) -> Any:
        """Return the prepared table.

        Raises:
            DataFormatError: when it is a script and there is no consent.
            MissingArtifactError: when the hub does not have it, or it cannot be downloaded completely.
        """
        self.check()
        files = list_files(self.repository)
        self._require_consent(files)
        broken: list[tuple[str, Path]] = []
        fault: MissingArtifactError | None = None
        for _ in range(MAX_ATTEMPTS):
            try:
                table, fault = self._load(), None
            except MissingArtifactError as error:
                fault = error
            broken = self._broken_downloads(files)
            if fault is None and not broken:
                return table
            self._discard(broken)
        if fault is not None and not broken:
            raise fault
        raise MissingArtifactError(
            f"{', '.join(sorted({name for name, _ in broken}))} of the dataset {self.repository} differ from the "
            f"hub's listing. Repeat the command later. {_REMEDY}"
        ) from fault

    def rows(self, image_column: str) -> Iterator[dict[str, Any]]:
        """Yield rows in the table's order, with the picture as the table stores it: bytes, path or URL."""
        from datasets import Image  # type: ignore[import-untyped]

        table = self.open()
        missing = {image_column} - set(table.column_names)
        if missing:
            raise DataFormatError(
                f"The dataset {self.repository} has no column {image_column!r}; it has {', '.join(table.column_names)}."
            )
        if isinstance(table.features[image_column], Image):
            table = table.cast_column(image_column, Image(decode=False))
        yield from table

    @property
    def cache(self) -> Path:
        """Folder of the files that a table downloads."""
        return Path(hub_config().cache_dir).absolute()

    def _require_consent(self, files: Sequence[ListedFile]) -> None:
        """Require consent in every run. The client itself asks only once."""
        script = f"{self.repository.id.rpartition('/')[2]}.py"
        if script in {file.name for file in files} and not self.trust_remote_code:
            raise DataFormatError(
                f"The dataset {self.repository} is a Python script ({script}) that would run on this machine. "
                "Read it on the hub; if you trust it, set trust_remote_code: true in its catalog entry and add your "
                "reason as a comment. Nothing was run."
            )

    def _broken_downloads(self, files: Sequence[ListedFile]) -> list[tuple[str, Path]]:
        """Return cached files that differ from the hub's listing, with their names on the hub.

        The client stores any response as the requested file, even an error page.
        """
        from modelscope.utils.config_ds import MS_DATASETS_CACHE

        listed = {file.name: file.sha256 for file in files if file.sha256}
        folders = (Path(MS_DATASETS_CACHE), Path(MS_DATASETS_CACHE) / "downloads")
        notes = [note for folder in folders for note in sorted(folder.glob("*.json"))]
        kept = [(self._name_in(note), note.with_suffix("")) for note in notes]
        return [
            (name, file)
            for name, file in kept
            if name in listed and file.is_file() and file_sha256(file) != listed[name]
        ]

    def _discard(self, broken: Sequence[tuple[str, Path]]) -> None:
        """Remove broken files from the client's cache, with the table that it prepared from them."""
        from modelscope.utils.config_ds import MS_DATASETS_CACHE

        for _, file in broken:
            file.unlink()
            file.with_name(f"{file.name}.json").unlink()
        if broken:
            shutil.rmtree(Path(MS_DATASETS_CACHE) / self.repository.id.replace("/", "___"), ignore_errors=True)

    def _name_in(self, note: Path) -> str:
        """Return the name of the file that a download holds, from the note beside it; empty for other tables."""
        try:
            address = urlsplit(json.loads(note.read_text(encoding="utf-8"))["url"])
        except (ValueError, KeyError, TypeError):
            return ""
        query = parse_qs(address.query)
        ours = address.path.endswith(f"/datasets/{self.repository.id}/repo")
        return query.get("FilePath", [""])[0] if ours else ""

    def _load(self) -> Any:
        from modelscope.msdatasets import MsDataset

        try:
            with hub_faults(self.repository), _resumed_downloads():
                return MsDataset.load(
                    self.repository.id,
                    subset_name=self.subset,
                    split=self.split,
                    version=self.repository.revision,
                    trust_remote_code=self.trust_remote_code,
                )
        except QwenVLLoraError:
            raise
        except Exception as error:  # the code of the table can raise anything
            raise MissingArtifactError(
                f"The dataset {self.repository} ({self.subset or 'only subset'}, split {self.split}) could not be "
                f"read: {type(error).__name__}: {' '.join(str(error).split())[:300]}. {_REMEDY}"
            ) from error


@contextmanager
def _resumed_downloads() -> Iterator[None]:
    """Let the client resume an earlier download of a file of the hub.

    The client can resume but has no option for it. Only files of the hub are resumed: what a script downloads
    elsewhere has no listed hash to detect a server that sent the whole file instead of the rest.
    """
    from modelscope.msdatasets.utils import hf_datasets_util

    original = hf_datasets_util.get_from_cache_ms
    hub = f"{hub_config().endpoint}/"

    def get(url: str, *arguments: Any, **settings: Any) -> str:
        resumed = {"resume_download": True} if url.startswith(hub) else {}
        path: str = original(url, *arguments, **{**settings, **resumed})
        return path

    hf_datasets_util.get_from_cache_ms = get
    try:
        yield
    finally:
        hf_datasets_util.get_from_cache_ms = original
