"""Sources: captions in files that people have, read as rows.

Each source may be iterated again and again, keeps images as paths until a row is checked, and gives
a `SourceSample` or a `Rejection` for every row. What makes a whole file unreadable is a
`DataFormatError`. Knows the forms of files; `record_forms` knows those of one JSON record.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from qwen_vl_lora.exceptions import DataFormatError, MissingArtifactError
from qwen_vl_lora.hub.addresses import replace_address, replace_addresses
from qwen_vl_lora.samples.record_forms import MARKED, read_record
from qwen_vl_lora.samples.records import Rejection, RowError, SourceSample, Turn
from qwen_vl_lora.samples.references import id_from_reference, resolve_reference
from qwen_vl_lora.samples.tables import read_table, require_text
from qwen_vl_lora.samples.texts import printable

FORMS = (
    "CSV with the columns image_path and caption, the tutorials' JSON, LLaVA or ShareGPT JSON, "
    "or JSON Lines with messages and images"
)


@dataclass(frozen=True)
class CaptionsFile:
    """One file of captions: CSV or JSON of several forms, recognised by content and not by its name.

    CSV: columns `image_path` and `caption`, optionally `image_id`; other columns are ignored; see `tables`.
    JSON (a list) and JSON Lines: see `record_forms`. Paths are relative to the file.

    Attributes:
        read_addresses: take https addresses as images too, as the paths that stand for them; without
            it their rows are rejected.
    """

    file: Path
    read_addresses: bool = False

    def with_addresses(self) -> CaptionsFile:
        return replace(self, read_addresses=True)

    def __str__(self) -> str:
        return str(self.file)

    @property
    def folders(self) -> tuple[Path, ...]:
        """Where images may lie without being allowed: the file's own folder."""
        return (self.file.absolute().parent,)

    def __iter__(self) -> Iterator[SourceSample | Rejection]:
        require_file(self.file, FORMS)
        with self.file.open("rb") as opened:
            start = _first_character(opened, self.file)
            opened.seek(0)
            if start == "[":
                yield from self._rows_of_list(_parse_whole(opened, self.file))
            elif start == "{":
                yield from self._rows_of_lines(opened)
            else:
                yield from self._rows_of_table(opened)

    def _rows_of_table(self, opened: IO[bytes]) -> Iterator[SourceSample | Rejection]:
        for row, record in read_table(opened, self.file, ("image_path", "caption")):
            yield self._read_cells(row, record)

    def _rows_of_list(self, records: Any) -> Iterator[SourceSample | Rejection]:
        for row, record in enumerate(records, start=1):
            yield self._read_json_row(row, record)

    def _rows_of_lines(self, opened: IO[bytes]) -> Iterator[SourceSample | Rejection]:
        lines = (line for line in opened if line.removeprefix(b"\xef\xbb\xbf").strip())
        for row, line in enumerate(lines, start=1):
            try:
                record = json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError as error:
                yield Rejection(row, "", "bad_encoding", f"The line is not UTF-8: {error}.")
            except (ValueError, RecursionError) as error:
                if row == 1:
                    self._refuse_single_object(opened)
                yield Rejection(row, "", "malformed_row", f"The line is no JSON: {error}.")
            else:
                if row == 1:
                    _refuse_coco(record, self.file)
                yield self._read_json_row(row, record)

    def _read_cells(self, row: int, record: dict[str, str] | RowError) -> SourceSample | Rejection:
        if isinstance(record, RowError):
            return Rejection(row, "", record.reason, record.detail)
        reference, folder = record["image_path"].strip(), self.folders[0]
        image_id = record.get("image_id", "").strip() or id_from_reference(reference, folder)
        try:
            image = resolve_reference(replace_address(reference) if self.read_addresses else reference, folder)
        except RowError as fault:
            return Rejection(row, image_id, fault.reason, fault.detail)
        return SourceSample(row, image_id, (image,), (Turn("assistant", record["caption"]),))

    def _read_json_row(self, row: int, record: Any) -> SourceSample | Rejection:
        if self.read_addresses:
            record = replace_addresses(record, MARKED)
        image_id = ""
        try:
            image_id, images, turns = read_record(record, row, self.folders[0])
        except RowError as fault:
            shown_id = record.get("id", "") if isinstance(record, dict) else ""
            return Rejection(row, printable(str(shown_id)), fault.reason, fault.detail)
        return SourceSample(row, image_id, images, turns)

    def _refuse_single_object(self, opened: IO[bytes]) -> None:
        """Stop at a JSON object that spans lines, such as an indented COCO file: it is no list of captions."""
        behind_first_line = opened.tell()
        opened.seek(0)
        try:
            record = _parse_whole(opened, self.file)
        except DataFormatError:
            opened.seek(behind_first_line)  # JSON Lines after all: the first is rejected, the others go on
            return
        _refuse_coco(record, self.file)
        raise DataFormatError(f"{self.file} holds one JSON object; required is {FORMS}.")


@dataclass(frozen=True)
class CocoCaptions:
    """Official COCO files: a captions JSON (`captions_train2014.json`) and the folder of its pictures.

    One row per annotation, in the file's order; `image_id` is COCO's number.
    """

    file: Path
    image_folder: Path

    def __str__(self) -> str:
        return str(self.file)

    @property
    def folders(self) -> tuple[Path, ...]:
        return (self.image_folder.absolute(),)

    def __iter__(self) -> Iterator[SourceSample | Rejection]:
        require_file(self.file, "a COCO captions file such as captions_train2014.json")
        if not self.image_folder.is_dir():
            raise MissingArtifactError(
                f"The folder of COCO pictures {self.image_folder} is not there. Set image_folder of the catalog entry; "
                "it is relative to the captions file."
            )
        with self.file.open("rb") as opened:
            tree = _parse_whole(opened, self.file)
        names = _coco_file_names(tree, self.file)
        for row, annotation in enumerate(tree["annotations"], start=1):
            yield self._read_annotation(row, annotation, names)

    def _read_annotation(self, row: int, annotation: Any, names: dict[Any, Any]) -> SourceSample | Rejection:
        if not isinstance(annotation, dict) or not {"image_id", "caption"} <= set(annotation):
            return Rejection(row, "", "missing_key", "An annotation needs image_id and caption.")
        image_id, caption = annotation["image_id"], annotation["caption"]
        shown_id = printable(str(image_id))
        if not isinstance(image_id, int | str) or not isinstance(caption, str):
            return _reject_cell(row, shown_id, caption)
        name = names.get(image_id)
        if not isinstance(name, str):
            return Rejection(row, shown_id, "missing_image", f"No entry of `images` has the id {shown_id}.")
        try:
            image = resolve_reference(name, self.folders[0])
        except RowError as fault:
            return Rejection(row, shown_id, fault.reason, fault.detail)
        return SourceSample(row, str(image_id), (image,), (Turn("assistant", caption),))


def require_file(file: Path, what: str) -> None:
    """Raises: MissingArtifactError when there is no such file."""
    if file.is_file():
        return
    if not file.is_dir():
        raise MissingArtifactError(f"The captions file {file} is not there; required is {what}. Check the path.")
    inside = sorted(path.name for path in file.iterdir() if path.suffix.lower() in (".csv", ".tsv", ".json", ".jsonl"))
    remedy = f"In it lie: {', '.join(inside[:5])}. Name one of them." if inside else "Name the file in it."
    raise MissingArtifactError(f"The captions file {file} is a folder; required is {what}. {remedy}")


def _first_character(opened: IO[bytes], file: Path) -> str:
    """The first character that is no blank."""
    text = require_text(opened, file).lstrip()
    if not text and not opened.read(1):
        raise DataFormatError(f"{file} is empty; required is {FORMS}.")
    return chr(text[0]) if text else ""


def _parse_whole(opened: IO[bytes], file: Path) -> Any:
    try:
        return json.loads(opened.read().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataFormatError(f"{file} is not UTF-8 at byte {error.start}. Save it as UTF-8.") from error
    except (ValueError, RecursionError) as error:
        raise DataFormatError(f"{file} is no valid JSON: {error}. It may be cut short; export it again.") from error


def _refuse_coco(record: Any, file: Path) -> None:
    if isinstance(record, dict) and "annotations" in record:
        raise DataFormatError(
            f"{file} is an official COCO file, which needs the folder of its pictures too: take the dataset "
            "qwen_vl_lora.datasets.sources.CocoCaptionsDataset for `captioned_images` in the catalog."
        )


def _coco_file_names(tree: Any, file: Path) -> dict[Any, Any]:
    """File names by image id; both lists are checked, their entries are not."""
    if not isinstance(tree, dict) or not all(isinstance(tree.get(key), list) for key in ("images", "annotations")):
        raise DataFormatError(f"{file} is no COCO captions file: it needs the lists `images` and `annotations`.")
    return {
        image["id"]: image.get("file_name")
        for image in tree["images"]
        if isinstance(image, dict) and isinstance(image.get("id"), int | str)
    }


def _reject_cell(row: int, image_id: str, caption: object) -> Rejection:
    if caption is None or caption != caption:  # NaN alone differs from itself
        return Rejection(row, image_id, "empty_caption", f"The caption is {caption}.")
    return Rejection(row, image_id, "malformed_row", f"A caption must be text; came {printable(repr(caption))}.")
