"""The `images` catalog entry: a versioned manifest over bytes that all versions share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kedro_datasets._typing import TablePreview

from qwen_vl_lora.datasets.artifacts import AtomicVersionedDataset
from qwen_vl_lora.exceptions import DataFormatError, MissingArtifactError
from qwen_vl_lora.runs.storage import sync_files
from qwen_vl_lora.samples.image_store import (
    MANIFEST_COLUMNS,
    ImageEntry,
    ImageStore,
    files_folder,
    publish_files,
    read_manifest,
    require_unchanged,
    write_manifest,
)


class ImageStoreDataset(AtomicVersionedDataset):
    """Pictures by content: loads a handle that reads bytes on demand, saves by renaming staged files.

    Bytes lie once in `files/` beside the manifests and are only ever added; a version is a manifest
    of a few kilobytes. The manifest appears last, so a version that is visible is whole.

    ```yaml
    images:
      type: qwen_vl_lora.datasets.images.ImageStoreDataset
      filepath: data/02_intermediate/tiny/images/manifest.csv
      versioned: true
    ```

    ```python
    images = ImageStoreDataset(filepath="data/02_intermediate/tiny/images/manifest.csv").load()
    images.open(images.entries[0].sha256).show()
    ```
    """

    def _read(self, path: Path) -> ImageStore:
        return read_manifest(path, self._files)

    def _write(self, data: Any, path: Path) -> None:
        if not isinstance(data, ImageStore):
            raise DataFormatError(f"images: an ImageStore was required, came {type(data).__name__}.")
        if data.published.absolute() != self._files.absolute():
            raise DataFormatError(
                f"The paths of the pictures name {data.published}, but `images` keeps them in {self._files}. "
                "Take `workspace` and `images` from one catalog."
            )
        publish_files(data, self._files)
        sync_files(self._files)  # a manifest must not outlive, in a power loss, the pictures that it names
        write_manifest(data, path)

    def check(self) -> None:
        """Refuse a version whose files are not all there, before any node runs. Looks at names only.

        A referred picture is hashed again if the size or the time of its file changed.

        Raises:
            MissingArtifactError: naming the version or the first missing file.
            DataFormatError: naming a referred picture with other bytes.
        """
        missing = []
        for entry in read_manifest(self.existing_path(), self._files):
            if entry.source:
                require_unchanged(entry)
            elif not self._has(entry):
                missing.append(entry.file_name)
        if missing:
            raise MissingArtifactError(
                f"{len(missing)} pictures of `images` are missing; the first is {self._files / missing[0]}. "
                "Run `kedro run --pipeline data_engineering`: it restores them from the source."
            )

    def preview(self, nrows: int = 20) -> TablePreview:
        """The first `nrows` pictures: id, sha256, path, size."""
        entries = self.load().entries[:nrows]
        rows = [[getattr(entry, column) for column in MANIFEST_COLUMNS] for entry in entries]
        return TablePreview({"index": list(range(len(rows))), "columns": list(MANIFEST_COLUMNS), "data": rows})

    def _has(self, entry: ImageEntry) -> bool:
        return (self._files / entry.file_name).is_file()

    @property
    def _files(self) -> Path:
        return files_folder(Path(self._filepath))
