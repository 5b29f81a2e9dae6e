"""The records that flow from a source to conversations: what one row of anybody's data becomes.

Knows nothing of Kedro, torch, files' formats or where the rows came from.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

from qwen_vl_lora.exceptions import DataFormatError

Role = Literal["system", "user", "assistant"]

IMAGE_SLOT = "<image>"
"""Stands in a user turn's text where the next image of the sample goes."""

Reason = Literal[
    # The row could not be read.
    "malformed_row",  # no JSON, too many cells, a value of the wrong type
    "missing_key",  # a column or key that the row needs is not in it
    "bad_encoding",  # bytes that are not UTF-8, or half a surrogate pair
    # Its id.
    "bad_id",  # empty, too long, or holding a slash or control character
    "ambiguous_id",  # differs from another id only in case or Unicode form
    "duplicate_id",  # the id of another row whose picture has other bytes
    # Its turns.
    "wrong_roles",  # an unknown role, or turns out of order
    "odd_turns",  # a question without its answer, or an answer without its question
    "no_answer",  # no assistant turn at all
    "placeholder_mismatch",  # another number of image slots than of images
    # Its texts.
    "empty_caption",  # an answer that shows nothing: empty, blank, invisible characters only, or NaN
    "empty_prompt",  # a user turn with neither text nor image, or an empty system turn
    "caption_too_long",  # a turn above `texts.MAX_TEXT_CHARACTERS`
    "special_token",  # a token of the chat format inside a text
    "longer_than_max_length",  # in tokens, which only training knows: it stands in `left_out_samples`
    # Access to its image.
    "url_not_allowed",
    "outside_allowed_roots",
    "missing_image",
    "unreadable_file",  # there, but no permission, or no regular file
    "file_too_large",  # above `image_stage.MAX_FILE_BYTES`
    # The image itself.
    "empty_file",
    "not_an_image",  # HTML saved as JPEG, text, anything without an image's signature
    "unsupported_format",  # TIFF, PDF, EPS, SVG and others outside the allow-list
    "zero_size_image",
    "too_many_pixels",
    "extreme_aspect_ratio",
    "animated_image",
    "damaged_image",  # truncated, or not decodable to its end
]
"""Why a row was rejected. Fixed words: `rejected_samples` is counted by them."""


class RowError(DataFormatError):
    """One row or image cannot be used; within a collection it becomes a `Rejection`."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, slots=True)
class Turn:
    """One message. In `user` turns each `IMAGE_SLOT` takes the next of the sample's images."""

    role: Role
    text: str


@dataclass(frozen=True, slots=True)
class SourceSample:
    """One row as a source gives it, before anything was checked.

    A caption is the case of one image and a single assistant turn: the user turn is
    then made from `prompt` when conversations are built.

    Attributes:
        row: 1-based number of the row in its source, for `rejected_samples`.
        id: the source's own id; several captions of one image share it.
        images: the original encoded bytes, or the path of a file that holds them.
        turns: messages in order.
    """

    row: int
    id: str
    images: tuple[bytes | Path, ...]
    turns: tuple[Turn, ...]


@dataclass(frozen=True, slots=True)
class Rejection:
    """A row that did not become a sample, and why.

    `reason` is a short fixed word (`missing_image`, `empty_caption`, …), `detail` the
    sentence for a person.
    """

    row: int
    image_id: str
    reason: Reason
    detail: str


@runtime_checkable
class FileSource(Protocol):
    """A source whose images are files: its own folders may be read without being allowed elsewhere."""

    @property
    def folders(self) -> tuple[Path, ...]: ...

    def __iter__(self) -> Iterator[SourceSample | Rejection]: ...
