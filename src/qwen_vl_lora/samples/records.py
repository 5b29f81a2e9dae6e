"""The values that pass from a source to conversations: samples, turns and rejections.

Knows nothing of Kedro, torch, file formats or the origin of the rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qwen_vl_lora.exceptions import DataFormatError

Role = Literal["system", "user", "assistant"]

IMAGE_SLOT = "<image>"
"""Marks the place of the sample's next picture in the text of a user turn."""

Reason = Literal[
    # The row could not be read.
    "malformed_row",  # not JSON, too many cells, a value of the wrong type
    "missing_key",  # a required column or key is missing
    "bad_encoding",  # bytes that are not UTF-8, or half a surrogate pair
    "unsupported_content",  # a key, flag or mark whose meaning is known and not supported, such as boxes or tool calls
    "rejected_by_source",  # the data set's own flag marks the row as unusable
    "excluded",  # named by the user in `captions.exclude`; no fault of the row
    "unknown_split",  # a value of the split column other than train, validation and test
    # Its id.
    "bad_id",  # empty, too long, or holding a control character
    "duplicate_id",  # the id of another row whose picture has other bytes
    # Its turns.
    "wrong_roles",  # an unknown role, or turns out of order
    "odd_turns",  # a question without its answer, or an answer without its question
    "no_answer",  # no assistant turn at all
    "placeholder_mismatch",  # the numbers of image slots and pictures differ
    "nothing_scored",  # the flags of the turns leave no answer to train
    # Its texts.
    "empty_caption",  # an answer without visible characters, or NaN
    "empty_prompt",  # a user turn with neither text nor picture, or an empty system turn
    "caption_too_long",  # a turn above `texts.MAX_TEXT_CHARACTERS`
    "special_token",  # a token of the chat format inside a text
    "longer_than_max_length",  # in tokens, which only training knows: used in `left_out_samples`
    # Access to its picture.
    "url_not_allowed",
    "outside_allowed_roots",
    "missing_image",
    "unreadable_file",  # no permission, or not a regular file
    "file_too_large",  # above `image_stage.MAX_FILE_BYTES`
    "changed_image",  # other bytes than for an earlier row; only where the file itself is kept (`image.storage`)
    # The picture itself.
    "empty_file",
    "not_an_image",  # HTML saved as JPEG, text, anything without the signature of a picture
    "unsupported_format",  # PDF, EPS, SVG, raw photos and others outside the allow-list
    "zero_size_image",
    "too_many_pixels",
    "extreme_aspect_ratio",
    "animated_image",
    "several_pictures",  # a TIFF of several pages, a HEIC of several pictures
    "damaged_image",  # truncated, or not decodable completely
]
"""Why a row was rejected. The words are fixed, because `rejected_samples` is counted by them."""


class RowError(DataFormatError):
    """One row or picture cannot be used; a collection turns it into a `Rejection`."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


Split = Literal["train", "validation", "test"]


@dataclass(frozen=True, slots=True)
class Turn:
    """One message. In `user` turns each `IMAGE_SLOT` stands for the next picture of the sample.

    Attributes:
        scored: whether an answer is trained; False if the data set marks it as context only.
    """

    role: Role
    text: str
    scored: bool = True


@dataclass(frozen=True, slots=True)
class Address:
    """A picture on the network, by its http or https URL."""

    url: str


Reference = bytes | Path | Address
"""The original encoded bytes of a picture, the path of its file, or its URL."""


@dataclass(frozen=True, slots=True)
class SourceSample:
    """One row as a source gives it, unchecked. A row with several captions gives several samples.

    A caption has one picture and a single assistant turn; the user turn is
    made from `prompt` when conversations are built.

    Attributes:
        row: 1-based number of the row in its source, for `rejected_samples`.
        id: the source's own id, shared by several captions of one picture; else the path of the picture.
        images: in the order of their slots.
        turns: messages in order.
        id_is_given: False if the id was made from the path: such an id never rejects a row.
        form: how the row was written (`caption`, `messages`, `conversations`, …); decides how texts are cleaned.
        split: the file's own split, if `captions.split_column` is set.
        source: name of the source among several.
        ignored: keys or columns that were not read; the same tuple for all rows of one form.
    """

    row: int
    id: str
    images: tuple[Reference, ...]
    turns: tuple[Turn, ...]
    id_is_given: bool = True
    form: str = "caption"
    split: Split | None = None
    source: str | None = None
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Rejection:
    """A row that did not become a sample, and why.

    Attributes:
        reason: a short fixed word (`missing_image`, `empty_caption`, …).
        detail: a sentence for the user.
        picture: a small one as a data URI, for the data page; None where the picture is the fault.
    """

    row: int
    image_id: str
    reason: Reason
    detail: str
    source: str | None = None
    picture: str | None = None


Row = SourceSample | Rejection
