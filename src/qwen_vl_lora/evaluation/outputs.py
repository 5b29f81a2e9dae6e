"""The captions of inference in the forms that others read: texts beside the pictures, JSON Lines, Parquet.

Each file is whole or absent. Knows nothing of how captions were made.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

from qwen_vl_lora.evaluation.generation import Caption
from qwen_vl_lora.exceptions import ParameterError
from qwen_vl_lora.inference_parameters import OutputParameters
from qwen_vl_lora.runs.storage import make_folder, sync_file, sync_folder, temporary, write_whole
from qwen_vl_lora.samples.named_pictures import NamedPicture

logger = logging.getLogger(__name__)

BESIDE = "beside"
_ROWS_AT_ONCE = 10_000


class Outputs:
    """Where the captions of named pictures go.

    Args:
        place: what `inference.images` names; a mirrored folder has the subfolders below it.
        named: the pictures, in order.

    Raises:
        ParameterError: if a file of captions exists and `overwrite` is false.
    """

    def __init__(self, settings: OutputParameters, place: Path, named: Sequence[NamedPicture]) -> None:
        self._settings = settings
        self._top = place if place.is_dir() else place.parent
        self._named = named
        self._tables = {
            name: Path(given).expanduser()
            for name, given in (("jsonl", settings.jsonl), ("parquet", settings.parquet))
            if given is not None
        }
        for name, file in self._tables.items():
            if file.exists() and not settings.overwrite:
                raise ParameterError(
                    f"inference.output.{name}: {file} exists. Name another file, or set "
                    "inference.output.overwrite: true."
                )

    def left_out(self, known: Mapping[str, Caption]) -> dict[str, str]:
        """Path → reason of pictures that have a sidecar already, of another run, and are not captioned again.

        Args:
            known: captions of earlier runs, by sha256.
        """
        if self._settings.sidecars is None or self._settings.overwrite:
            return {}
        return {
            picture.path: f"has_sidecar: {file} exists; inference.output.overwrite: true replaces it"
            for picture, file in self._sidecars()
            if picture.sha256 not in known and os.path.lexists(file)
        }

    def write(self, captions: Mapping[str, Caption]) -> None:
        """Write every form. A picture without caption has no line and no sidecar.

        Args:
            captions: by sha256.
        """
        if self._settings.sidecars is not None:
            self._write_sidecars(captions)
        for name, file in self._tables.items():
            make_folder(file.parent)
            partial = temporary(file)
            try:
                write = _write_lines if name == "jsonl" else _write_parquet
                count = write(partial, self._rows(captions, file.absolute().parent))
                sync_file(partial)
                partial.replace(file)
            finally:
                partial.unlink(missing_ok=True)
            sync_folder(file.parent)
            logger.info("%d captions in %s.", count, file)

    def _write_sidecars(self, captions: Mapping[str, Caption]) -> None:
        written, there, folders = dict[Path, str](), 0, set[Path]()
        for picture, file in self._sidecars():
            caption = captions.get(str(picture.sha256))
            if caption is None or caption.reason:
                there += caption is None and os.path.lexists(file)
                continue
            if file in written:
                logger.warning("%s would describe %s too; it describes %s.", file, picture.path, written[file])
            elif os.path.lexists(file) and not self._settings.overwrite:
                there += 1
            else:
                make_folder(file.parent)
                write_whole(file, f"{self._line(caption)}\n", sync=False)
                written[file] = picture.path
                folders.add(file.parent)
        for folder in folders:
            sync_folder(folder)
        logger.info("%d sidecars written, %d were there and stay.", len(written), there)

    def _sidecars(self) -> Iterator[tuple[NamedPicture, Path]]:
        """Each picture that has a file of its own, and its sidecar."""
        for picture in self._named:
            if picture.sha256 is not None and picture.file is not None:
                yield picture, self._sidecar(picture.file.with_suffix(".txt"))

    def _sidecar(self, beside: Path) -> Path:
        if self._settings.sidecars in (None, BESIDE):
            return beside
        top = self._top.absolute()
        inner = beside.absolute()
        below = inner.relative_to(top) if inner.is_relative_to(top) else Path(inner.name)
        return Path(str(self._settings.sidecars)).expanduser() / below

    def _line(self, caption: Caption) -> str:
        """A caption with prefix and suffix on one line."""
        return f"{self._settings.prefix}{' '.join(caption.text.split())}{self._settings.suffix}"

    def _rows(self, captions: Mapping[str, Caption], folder: Path) -> Iterator[dict[str, str]]:
        """Rows as a source of training reads them; paths below the folder of the file are relative to it."""
        for picture in self._named:
            caption = captions.get(str(picture.sha256))
            if picture.file is None or caption is None or caption.reason:
                continue
            path = picture.file.absolute()
            shown = path.relative_to(folder) if path.is_relative_to(folder) else path
            yield {"image_path": _path_as_text(shown), "caption": self._line(caption)}


def _path_as_text(path: Path) -> str:
    """The path as a text; bytes that are not UTF-8 as \\udc…, as in captions.csv."""
    return path.as_posix().encode("utf-8", errors="backslashreplace").decode("utf-8")


def _write_lines(file: Path, rows: Iterator[dict[str, str]]) -> int:
    count = 0
    with file.open("w", encoding="utf-8") as lines:
        for count, row in enumerate(rows, start=1):  # noqa: B007 (the last one is returned)
            lines.write(f"{json.dumps(row, ensure_ascii=False)}\n")
    return count


def _write_parquet(file: Path, rows: Iterator[dict[str, str]]) -> int:
    import pyarrow as pa
    from pyarrow import parquet

    count, texts = 0, pa.schema([("image_path", pa.string()), ("caption", pa.string())])
    with parquet.ParquetWriter(file, texts) as writer:
        while part := list(islice(rows, _ROWS_AT_ONCE)):
            writer.write_table(pa.Table.from_pylist(part, schema=texts))
            count += len(part)
    return count
