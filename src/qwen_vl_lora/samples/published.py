"""Files of public data sets with forms of their own, as offered for download.

COCO          captions_train2014.json: {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}
VizWiz        the same, with `is_rejected` of each annotation
Karpathy      dataset_coco.json, dataset_flickr30k.json: {"images": [{"filepath", "filename", "sentences", "split"}]}
TextCaps      TextCaps_0.1_train.json: {"data": [{"image_path", "caption_str"}]}
Flickr8k      Flickr8k.token.txt: `name.jpg#0<tab>caption`
kohya         meta_cap.json: {"path of a picture": {"caption": …, "tags": …}}
Label Studio  JSON: [{"data": {"image": …}, "annotations": [{"result": [{"type": "textarea", …}]}]}]
pandas        DataFrame.to_json(): {"image_path": {"0": …}, "caption": {"0": …}}, and orient="split"
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from qwen_vl_lora.exceptions import DataFormatError, MissingArtifactError
from qwen_vl_lora.samples.fields import UNUSABLE_FLAGS, USABLE_FLAGS, plain_name
from qwen_vl_lora.samples.meanings import Unread, check_record
from qwen_vl_lora.samples.record_forms import RecordReader
from qwen_vl_lora.samples.records import Rejection, Row, RowError, SourceSample, Turn
from qwen_vl_lora.samples.references import Place, id_from_reference
from qwen_vl_lora.samples.texts import printable
from qwen_vl_lora.samples.values import captions_of, id_of

_TOKEN_LINE = re.compile(r"(?P<name>[^\t#]+\.[^\t#]+)#\d+\t(?P<caption>.*)")
_OF_COCO_ANNOTATIONS = ("id", "image_id", "caption")
_OF_COCO_IMAGES = (
    *("id", "file_name", "width", "height", "license", "date_captured", "coco_url", "flickr_url", "flickr_640_url"),
    "vizwiz_url",
)
"""Keys that are read, or carry nothing about the captions."""

_OF_KARPATHY_IMAGES = ("filepath", "filename", "sentences", "split", "cocoid", "imgid", "sentids")

_PICTURE_NAME = re.compile(r".*\.(jpe?g|png|webp|bmp|gif)", re.IGNORECASE | re.DOTALL)


def is_token_file(start: str) -> bool:
    """Whether a file begins like a token file of Flickr8k or Flickr30k."""
    return _TOKEN_LINE.match(start) is not None


def rows_of_token_file(opened: IO[bytes], place: Place) -> Iterator[Row]:
    """Yield one row for each line `name.jpg#0<tab>caption`."""
    lines = (line for line in opened if line.strip())
    for row, line in enumerate(lines, start=1):
        found = _TOKEN_LINE.match(line.decode("utf-8-sig", errors="surrogateescape").rstrip("\r\n"))
        if found is None:
            yield Rejection(row, "", "malformed_row", "The line does not have the form name.jpg#0<tab>caption.")
            continue
        name = found["name"].strip()
        try:
            image = place.resolve(name)
        except RowError as fault:
            yield Rejection(row, printable(name), fault.reason, fault.detail)
            continue
        image_id = id_from_reference(name, place.folder)
        yield SourceSample(row, image_id, (image,), (Turn("assistant", found["caption"]),), id_is_given=False)


def is_coco(tree: Any) -> bool:
    """Whether a JSON object is an official COCO captions file."""
    return isinstance(tree, dict) and all(isinstance(tree.get(key), list) for key in ("images", "annotations"))


def rows_of_coco(tree: Any, file: Path, reader: RecordReader, image_folder: Path | None) -> Iterator[Row]:
    """Yield one row for each annotation, in the file's order; the id is COCO's number.

    Raises:
        MissingArtifactError: when no folder of pictures is given and the pictures are not beside the file.
    """
    images = {
        image["id"]: image
        for image in tree["images"]
        if isinstance(image, dict) and isinstance(image.get("id"), int | str)
    }
    names = (image.get("file_name") for image in images.values())
    first = next((name for name in names if isinstance(name, str)), None)
    if image_folder is None and first is not None and not (reader.place.folder / first).is_file():
        raise MissingArtifactError(
            f"{file} is a COCO captions file, and its pictures are not beside it ({printable(first)} not found). "
            f'Give their folder: --params "captions_file={file},image_folder=path/to/train2014".'
        )
    for row, annotation in enumerate(tree["annotations"], start=1):
        yield from _rows_of_annotation(row, annotation, images, reader)


def _rows_of_annotation(
    row: int, annotation: Any, images: dict[Any, dict[str, Any]], reader: RecordReader
) -> Iterator[Row]:
    shown_id = ""
    unread: Unread = {}
    try:
        if not isinstance(annotation, dict) or not {"image_id", "caption"} <= set(annotation):
            raise RowError("missing_key", "An annotation needs image_id and caption.")
        shown_id = printable(str(annotation["image_id"]))
        if not isinstance(annotation["image_id"], int | str):
            raise RowError("malformed_row", f"An image_id must be a number or text; got {shown_id}.")
        entry = images.get(annotation["image_id"], {})
        name = entry.get("file_name")
        if not isinstance(name, str):
            raise RowError("missing_image", f"No entry of `images` has the id {shown_id}.")
        for holder, known in ((annotation, _OF_COCO_ANNOTATIONS), (entry, _OF_COCO_IMAGES)):
            check_record(holder, False, unread)
            unread.update(
                (key, None)
                for key in holder
                if key not in known and plain_name(key) not in (*UNUSABLE_FLAGS, *USABLE_FLAGS)
            )
        image = reader.place.resolve(name)
        texts = captions_of([annotation["caption"]], unread)
        image_id = id_of(annotation["image_id"])
    except RowError as fault:
        yield Rejection(row, shown_id, fault.reason, fault.detail)
        return
    for text in texts:
        yield SourceSample(row, image_id, (image,), (Turn("assistant", text),), form="coco", ignored=tuple(unread))


def records_of_object(tree: Any) -> list[dict[str, Any]] | None:
    """Return the records of an object that contains several; None for other objects."""
    if not isinstance(tree, dict):
        return None
    images = tree.get("images")
    if isinstance(images, list) and images and all(isinstance(one, dict) and "sentences" in one for one in images):
        return [_record_of_karpathy(one) for one in images]
    if isinstance(tree.get("data"), list) and isinstance(tree.get("columns"), list):
        columns = tree["columns"]
        is_whole = lambda line: isinstance(line, list) and len(line) == len(columns)  # noqa: E731
        return [dict(zip(columns, line, strict=True)) if is_whole(line) else line for line in tree["data"]]
    if isinstance(tree.get("data"), list):
        return list(tree["data"])
    values = list(tree.values())
    if values and all(isinstance(value, dict) for value in values):
        if all(_PICTURE_NAME.fullmatch(key) or {"caption", "tags"} & set(tree[key]) for key in tree):
            return [_record_of_kohya(name, value) for name, value in tree.items()]
        rows = list(values[0])
        if all(list(value) == rows for value in values) and all(str(row).isdigit() for row in rows):
            return [{name: column[row] for name, column in tree.items()} for row in rows]
    return None


def _record_of_karpathy(image: dict[str, Any]) -> dict[str, Any]:
    path = "/".join(str(image[key]) for key in ("filepath", "filename") if image.get(key))
    record = {"image_path": path, "captions": image["sentences"]}
    record |= {key: value for key, value in image.items() if key not in _OF_KARPATHY_IMAGES}
    own = image.get("cocoid", image.get("imgid"))
    return record | ({} if own is None else {"image_id": own}) | ({"split": image["split"]} if "split" in image else {})


def _record_of_kohya(name: str, value: dict[str, Any]) -> dict[str, Any]:
    """Use the tags as the caption if there is no caption."""
    chosen = "caption" if value.get("caption") else "tags"
    others = {key: other for key, other in value.items() if key not in ("caption", chosen)}
    return {"image_path": name, "caption": value.get(chosen)} | others


def refuse_object(tree: Any, file: Path, forms: str) -> None:
    """Refuse an object that is known not to be captions, or is unknown."""
    if not isinstance(tree, dict):
        raise DataFormatError(f"{file} contains one JSON value that is not an object. Expected {forms}.")
    keys = ", ".join(printable(str(key), 40) for key in list(tree)[:8]) or "no key"
    if tree and all(
        isinstance(value, dict) and {"file_name", "formatting", "columns"} & set(value) for value in tree.values()
    ):
        raise DataFormatError(
            f"{file} is LLaMA-Factory's dataset_info.json, which lists data sets. Give the file that one of them names "
            "as file_name."
        )
    if "annotations" in tree:
        raise DataFormatError(f"{file} looks like a COCO file; expected the lists `images` and `annotations`.")
    known = {"messages", "conversations", "conversation", "texts", "query", "instruction", "prompt", "question"}
    if not known & set(tree) and len(tree) > 0 and not any(isinstance(value, str) for value in tree.values()):
        raise DataFormatError(
            f"{file} contains one JSON object with the keys {keys}, which is not a known form of captions. "
            f"Expected {forms}. Write a list of records, or one record a line."
        )
