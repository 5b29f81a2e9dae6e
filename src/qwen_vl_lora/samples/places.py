"""Selects the source for the captions that a user names: a file, a folder, or a data set on a hub or on S3."""

from __future__ import annotations

import re
from pathlib import Path, PurePath

from qwen_vl_lora.exceptions import DataFormatError, MissingArtifactError
from qwen_vl_lora.hub.data_files import parse_data_place
from qwen_vl_lora.hub.s3 import Bucket, parse_s3
from qwen_vl_lora.samples.archives import TarShards
from qwen_vl_lora.samples.columnar import ColumnarFiles
from qwen_vl_lora.samples.folders import TAR_SUFFIXES, open_folder, split_named
from qwen_vl_lora.samples.hub_data import HubData
from qwen_vl_lora.samples.s3_data import S3Data
from qwen_vl_lora.samples.source import Source
from qwen_vl_lora.samples.sources import FORMS, CaptionsFile, require_file
from qwen_vl_lora.samples.texts import printable

_REMOTE = re.compile(r"[a-z][a-z0-9+.-]+:/{1,2}\S+", re.IGNORECASE)
_OWNER_AND_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w.-]+)?")


def open_place(place: str, image_folder: Path | None = None) -> Source:
    """Return the source for a path, for `hf:owner/name` or `ms:owner/name`, or for `s3://bucket/key`.

    Raises:
        MissingArtifactError: when nothing is found, with a suggestion.
        DataFormatError: when a folder contains no captions.
    """
    remote = parse_data_place(place)
    if remote is not None:
        return HubData(*remote, image_folder)
    if (stored := parse_s3(place)) is not None:
        bucket, key = stored
        return S3Data(Bucket(bucket), key, image_folder)
    path = Path(place).expanduser()
    if not path.exists():
        _refuse_remote(place)
        require_file(path, FORMS)
    if path.is_dir():
        return open_folder(path, image_folder)
    if path.name.lower().endswith(TAR_SUFFIXES):
        return TarShards((path,))
    with path.open("rb") as opened:
        start = opened.read(6)
    if start[:4] == b"PAR1" or start == b"ARROW1" or path.suffix == ".arrow":
        split = split_named(PurePath(path.name))
        return ColumnarFiles((path,), image_folder, (split,) if split else ())
    return CaptionsFile(path, image_folder)


def _refuse_remote(place: str) -> None:
    """Raise the error for a URL or a name on a hub."""
    if _REMOTE.fullmatch(place):
        raise DataFormatError(
            f"{printable(place)} is a URL, but captions are read from files. Download it and give its path."
        )
    if _OWNER_AND_NAME.fullmatch(place) and not Path(place).suffix:
        raise MissingArtifactError(
            f"Captions file not found: {place}. If it is a data set on a hub, name the hub: captions_file=hf:{place} "
            f"(Hugging Face) or captions_file=ms:{place} (ModelScope)."
        )
