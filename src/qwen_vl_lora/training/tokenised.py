"""Conversations as token ids, made once for a base, a picture size and texts, and read from memory-mapped files.

`<workspace>/tokenised/<key>/` has one file for each column, and `samples.json` with the parts of the key and a hash of
each file. It appears by one rename. Lists stand one after the other; `<column>_ends` says where each ends.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from itertools import tee
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from qwen_vl_lora.exceptions import DataFormatError
from qwen_vl_lora.model.base_model import BaseModel
from qwen_vl_lora.model.chat import ChatEncoder, EncodedConversation
from qwen_vl_lora.model.fingerprints import WEIGHTS_SUFFIX
from qwen_vl_lora.runs.artifacts import digest
from qwen_vl_lora.runs.storage import discard, file_sha256, files_sha256, replace, sync_tree, temporary
from qwen_vl_lora.samples.conversations import Conversations
from qwen_vl_lora.samples.digests import Digests
from qwen_vl_lora.samples.prompts import Counted, TrainedPrompt, question_of, system_of

logger = logging.getLogger(__name__)

FOLDER, HEADER = "tokenised", "samples.json"
_FORM = 1
"""Changes when the files would mean something else."""

_LISTS = {"tokens": np.int32, "pictures": np.int32, "names": np.uint8, "texts": np.uint8}
"""Columns of lists. A scored token is stored as its complement, `~id`; a picture is one token, as in the text."""

_NUMBERS = {"lengths": np.int32, "groups": np.int32, "questions": np.int32, "systems": np.int32}
"""Columns of one number for each sample: tokens with all image tokens, and places in `texts`, -1 for none."""

_TABLES = {"hashes": np.dtype("S64"), "grids": np.dtype(np.int32)}
"""sha256 and grid (three numbers) of each picture in its size for the model."""

_DTYPES: dict[str, npt.DTypeLike] = {**_LISTS, **{f"{name}_ends": np.int64 for name in _LISTS}, **_NUMBERS, **_TABLES}


class TokenisedSamples(Sequence[EncodedConversation]):
    """Encoded conversations, each read from disk when it is asked for. Pickling sends the place of the files.

    Attributes:
        sha256: of the stored form of all conversations, also if only some of them are chosen.
    """

    def __init__(self, folder: Path, chosen: npt.NDArray[np.int64] | None = None) -> None:
        header = json.loads((folder / HEADER).read_text(encoding="utf-8"))
        self.sha256: str = header["sha256"]
        self._image_token, self._merge_size = header["image_token"], header["merge_size"]
        self._columns = {name: _mapped(folder / name, dtype) for name, dtype in _DTYPES.items()}
        self._grids = self._columns["grids"].reshape(-1, 3)
        self._chosen = np.arange(len(self._columns["lengths"])) if chosen is None else chosen
        self._folder = folder

    def choose(self, places: npt.NDArray[np.int64]) -> TokenisedSamples:
        """The samples at these places, in their order."""
        return TokenisedSamples(self._folder, self._chosen[places])

    def __len__(self) -> int:
        return len(self._chosen)

    @overload
    def __getitem__(self, index: int) -> EncodedConversation: ...
    @overload
    def __getitem__(self, index: slice) -> list[EncodedConversation]: ...
    def __getitem__(self, index: int | slice) -> EncodedConversation | list[EncodedConversation]:
        if isinstance(index, slice):
            return list(map(self._read, self._chosen[index]))
        return self._read(self._chosen[index])

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenisedSamples, (self._folder.absolute(), self._chosen)

    @property
    def lengths(self) -> npt.NDArray[np.int32]:
        """Tokens of each sample, with all image tokens."""
        return self._numbers("lengths")

    @property
    def groups(self) -> npt.NDArray[np.int32]:
        """A number for each sample; those with the same number can share a row."""
        return self._numbers("groups")

    def id_of(self, index: int) -> str:
        """The id of one sample, without reading its tokens."""
        return self._text("names", self._chosen[index])

    def prompt(self, *, override: bool) -> TrainedPrompt:
        """The questions and system texts, as `TrainedPrompt.of_conversations` counts them."""
        questions, systems = self._count("questions"), self._count("systems")
        del questions[None]  # of conversations that do not ask about a picture
        return TrainedPrompt(Counted.of(questions), Counted.of(systems), override)

    def _count(self, column: str) -> Counter[str | None]:
        numbers = Counter(self._numbers(column).tolist())
        return Counter({None if place < 0 else self._text("texts", place): count for place, count in numbers.items()})

    def _numbers(self, column: str) -> npt.NDArray[np.int32]:
        numbers: npt.NDArray[np.int32] = self._columns[column][self._chosen]
        return numbers

    def _list(self, column: str, place: int) -> npt.NDArray[Any]:
        ends = self._columns[f"{column}_ends"]
        return self._columns[column][ends[place - 1] if place else 0 : ends[place]]

    def _text(self, column: str, place: int) -> str:
        return self._list(column, place).tobytes().decode()

    def _read(self, place: int) -> EncodedConversation:
        tokens, pictures = self._list("tokens", place), self._list("pictures", place)
        scored, grids = tokens < 0, self._grids[pictures]
        ids = np.where(scored, ~tokens, tokens).astype(np.int64)
        repeats = np.ones(len(ids), dtype=np.int64)
        repeats[ids == self._image_token] = grids.prod(axis=1) // self._merge_size**2
        ids = ids.repeat(repeats)
        return EncodedConversation(
            id=self._text("names", place),
            ids=ids,
            scored=scored.repeat(repeats),
            is_image=ids == self._image_token,
            images=tuple(sha256.decode() for sha256 in self._columns["hashes"][pictures].tolist()),
            grids=tuple((time, down, across) for time, down, across in grids.tolist()),
        )


def _mapped(file: Path, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    if not file.stat().st_size:  # cannot be mapped
        return np.empty(0, dtype)
    return np.asarray(np.memmap(file, dtype, mode="r"))


def tokenise(
    conversations: Conversations,
    base_model: BaseModel,
    picture_size: Mapping[str, int | None],
    root: Path,
    make_encoder: Callable[[], ChatEncoder],
) -> TokenisedSamples:
    """The samples of all conversations, from the files of an earlier run if there are any.

    Args:
        picture_size: that the encoder has.
        root: folder of all tokenised samples of the recipe.
        make_encoder: called if they have to be made; the encoder has the pictures of the conversations.

    Raises:
        DataFormatError: if nothing in a conversation is scored.
    """
    key = {
        "form": _FORM,
        "conversations": conversations.stored_sha256,
        "image": picture_size,
        "base": {name: sha256 for name, sha256 in base_model.files.items() if not name.endswith(WEIGHTS_SUFFIX)},
        "packages": {name: importlib.metadata.version(name) for name in ("transformers", "tokenizers")},
    }
    folder = root / digest(key)[:16]
    if folder.is_dir() and not _is_whole(folder):
        logger.warning("Tokenised samples %s are damaged; they are made again.", folder)
        discard(folder)
    if not folder.is_dir():
        making = temporary(folder)
        making.mkdir(parents=True)
        try:
            header = _write(conversations, make_encoder(), making)
            header |= {"key": key, "sha256": conversations.sha256, "files": files_sha256(making)}
            text = json.dumps({**header, "digest": digest(header)}, indent=2)
            (making / HEADER).write_text(text, encoding="utf-8")
            sync_tree(making)
            replace(making, folder)
        finally:
            shutil.rmtree(making, ignore_errors=True)
    return TokenisedSamples(folder)


def _is_whole(folder: Path) -> bool:
    try:
        header = json.loads((folder / HEADER).read_text(encoding="utf-8"))
        files = header["files"].items()
        return header.pop("digest") == digest(header) and all(file_sha256(folder / name) == was for name, was in files)
    except (OSError, ValueError, KeyError):
        return False


def _write(conversations: Conversations, encoder: ChatEncoder, folder: Path) -> dict[str, Any]:
    """Write the columns. Returns what a reader needs besides."""
    prompts, silent = Digests(), []
    pictures: defaultdict[tuple[str, tuple[int, int, int]], int] = defaultdict()
    texts: defaultdict[str, int] = defaultdict()
    for numbered in (pictures, texts):  # a new key gets the next number
        numbered.default_factory = numbered.__len__
    with ExitStack() as stack:
        columns = _Columns(folder, stack)
        given, encoded = tee(conversations)
        both = zip(given, encoder.encode_all(encoded), strict=True)
        bar = tqdm(both, "tokenise", len(conversations), unit="sample", leave=False, disable=None)
        for conversation, item in bar:
            if not item.scored.any():
                silent.append(item.id)
            is_token = ~item.is_image
            counts = np.array([encoder.sizer.num_tokens(grid) for grid in item.grids], dtype=np.int64)
            is_token[np.flatnonzero(item.is_image)[np.cumsum(counts) - counts]] = True
            columns.add_list("tokens", np.where(item.scored, ~item.ids, item.ids)[is_token])
            columns.add_list("pictures", [pictures[each] for each in zip(item.images, item.grids, strict=True)])
            columns.add_list("names", item.id.encode())
            columns.add("lengths", len(item.ids))
            for column, text in (("questions", question_of(conversation)), ("systems", system_of(conversation))):
                columns.add(column, -1 if text is None else texts[text])
            prompts.add(f"{len(prompts)}" if item.shared_prompt is None else repr(item.shared_prompt))
        if silent:
            raise DataFormatError(
                f"{len(silent)} of {len(conversations)} conversations have no assistant turn, so nothing in them is "
                f"scored; the first is {silent[0]!r}. Every conversation needs an answer."
            )
        columns.add("groups", prompts.first_places())
        for text in texts:
            columns.add_list("texts", text.encode())
        columns.add("hashes", [sha256.encode() for sha256, _ in pictures])
        columns.add("grids", [grid for _, grid in pictures])
    return {"image_token": encoder.image_token_id, "merge_size": encoder.sizer.merge_size}


class _Columns:
    """Writes the columns of one folder."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._files = {name: stack.enter_context((folder / name).open("wb")) for name in _DTYPES}
        self._ends = dict.fromkeys(_LISTS, 0)

    def add(self, column: str, numbers: npt.ArrayLike) -> None:
        self._files[column].write(np.asarray(numbers, _DTYPES[column]).tobytes())

    def add_list(self, column: str, items: npt.ArrayLike | bytes) -> None:
        taken = items if isinstance(items, bytes) else np.asarray(items, _LISTS[column]).tobytes()
        self._files[column].write(taken)
        self._ends[column] += len(taken) // np.dtype(_LISTS[column]).itemsize
        self._files[f"{column}_ends"].write(np.int64(self._ends[column]).tobytes())
