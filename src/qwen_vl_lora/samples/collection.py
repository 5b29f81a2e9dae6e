"""From a source's rows to samples: every row is kept or rejected with its reason, none is lost.

Rows stream through: texts are checked first, then pictures by several threads with a bounded
look-ahead, so memory does not grow with the bytes of the images. Nothing is published here; the
bytes lie on the stage until the `images` dataset is saved.
"""

from __future__ import annotations

import os
import random
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar, runtime_checkable

from qwen_vl_lora.exceptions import DataFormatError
from qwen_vl_lora.hub.fetching import Fetcher
from qwen_vl_lora.parameters import CaptionsParameters, ImageParameters, QuarantineParameters
from qwen_vl_lora.samples.identity import ImageRegister, check_id, image_ids
from qwen_vl_lora.samples.image_stage import DataFolders, Fetch, ImageStage, Picture
from qwen_vl_lora.samples.image_store import ImageEntry, ImageStore
from qwen_vl_lora.samples.looks import stack_looks
from qwen_vl_lora.samples.records import FileSource, Rejection, RowError, SourceSample, Turn
from qwen_vl_lora.samples.rejections import MAX_DETAIL_CHARACTERS, rejection_table, text_column
from qwen_vl_lora.samples.texts import printable
from qwen_vl_lora.samples.turns import clean_turns

if TYPE_CHECKING:
    import pandas as pd

LOOK_AHEAD = 4
"""Rows in hand per thread: enough to keep the threads busy, few enough to bound the bytes in memory."""

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class Collected(NamedTuple):
    """The outputs of a collection, in the order in which the pipeline names them.

    Attributes:
        images: the staged pictures; saving the `images` dataset publishes them.
        samples: `{"row", "id", "image_ids", "images": [sha256, …], "turns": [{"role", "text"}, …]}`.
        caption_table: a row for each sample of one image and one answer.
        rejected_samples: a row for each row of the source that is not in `samples`.
    """

    images: ImageStore
    samples: list[dict[str, Any]]
    caption_table: pd.DataFrame
    rejected_samples: pd.DataFrame


class _Checked(NamedTuple):
    """A sample whose texts and pictures are good, without the pictures' bytes."""

    row: int
    id: str
    pictures: tuple[Picture, ...]
    turns: tuple[Turn, ...]


@runtime_checkable
class RemoteSource(Protocol):
    """A source whose pictures lie on the network, and that knows where they may be fetched from.

    No `FileSource`: looking at its rows before a run would download them.
    """

    @property
    def cache_folders(self) -> tuple[Path, ...]: ...

    def fetcher(self, image: ImageParameters) -> Fetcher: ...


@runtime_checkable
class AddressSource(Protocol):
    """A source of anybody's files, which may name pictures by address where that was asked for."""

    def with_addresses(self) -> Iterable[SourceSample | Rejection]: ...


def collect(
    source: Iterable[SourceSample | Rejection],
    workspace: Path,
    captions: CaptionsParameters,
    image: ImageParameters,
    quarantine: QuarantineParameters,
    fetch: Fetch | None = None,
) -> Collected:
    """Check and stage everything that a source gives.

    Pictures on the network are fetched by the source's own rules, or by those of `image` when it allows
    URLs. `fetch` takes the place of those rules: for a caller with rules of his own.

    Raises:
        DataFormatError: when the source gives no rows, or a larger share of bad ones than
            `quarantine.max_share`.
        OSError: when the stage cannot be written.
    """
    folders = DataFolders.of(workspace)
    readable: tuple[Path, ...] = source.folders if isinstance(source, FileSource) else ()
    if isinstance(source, RemoteSource):
        readable, fetch = source.cache_folders, fetch or source.fetcher(image).fetch
    elif image.allow_urls:
        fetch = fetch or Fetcher(image.url_hosts, image.url_timeout, image.url_max_bytes).fetch
        source = source.with_addresses() if isinstance(source, AddressSource) else source
    stage = ImageStage(folders, image, readable, fetch)
    gathered = _Gathered(stage)

    def check(row: SourceSample | Rejection) -> _Checked | Rejection:
        return _check_row(row, stage, captions.collapse_whitespace)

    from tqdm import tqdm

    checked_rows = map_in_order(check, take_rows(source, captions), _num_threads())
    for checked in tqdm(
        checked_rows, total=captions.num_rows, desc="collect_samples", unit="row", leave=False, disable=None
    ):
        gathered.add(checked)
    gathered.require_good_share(quarantine.max_share)
    return gathered.to_outputs(folders)


def take_rows(
    source: Iterable[SourceSample | Rejection], captions: CaptionsParameters
) -> Iterator[SourceSample | Rejection]:
    """Yield the rows that `captions` asks for, in the source's order.

    A random sample is drawn in one pass over the source, of whatever length, and holds
    `num_rows` rows in memory, with their bytes where the source gives bytes and not paths.
    """
    if captions.num_rows is None or captions.sampling == "first":
        yield from islice(source, captions.num_rows)
        return
    rng = random.Random(captions.seed)
    chosen: list[tuple[int, SourceSample | Rejection]] = []
    for number, row in enumerate(source):
        if number < captions.num_rows:
            chosen.append((number, row))
        elif (place := rng.randrange(number + 1)) < captions.num_rows:
            chosen[place] = (number, row)
    chosen.sort(key=lambda numbered: numbered[0])
    yield from (row for _, row in chosen)


def map_in_order(function: Callable[[_Item], _Result], items: Iterable[_Item], num_threads: int) -> Iterator[_Result]:
    """Apply a function in threads and yield the results in the order of the items.

    At most `num_threads * LOOK_AHEAD` items are taken ahead of the result that is yielded.
    """
    with ThreadPoolExecutor(num_threads) as pool:
        pending: deque[Future[_Result]] = deque()
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) >= num_threads * LOOK_AHEAD:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _num_threads() -> int:
    # Reading and decoding release the interpreter lock; more threads than cores only fight for it.
    return max(2, min(16, os.cpu_count() or 1))


def _check_row(row: SourceSample | Rejection, stage: ImageStage, collapse_whitespace: bool) -> _Checked | Rejection:
    if isinstance(row, Rejection):
        return row
    try:
        check_id(row.id)
        turns = clean_turns(row.turns, len(row.images), collapse_whitespace)
        pictures = tuple(stage.add(image) for image in row.images)
    except RowError as fault:
        return Rejection(row.row, row.id, fault.reason, fault.detail)
    return _Checked(row.row, row.id, pictures, turns)


class _Gathered:
    """What a collection has so far: columns and records that cost some hundred bytes a row."""

    def __init__(self, stage: ImageStage) -> None:
        self._stage = stage
        self._register = ImageRegister()
        self._looks: dict[str, bytes] = {}
        self._samples: list[dict[str, Any]] = []
        self._captions: list[tuple[ImageEntry, str]] = []
        self._rejections: list[Rejection] = []

    def add(self, checked: _Checked | Rejection) -> None:
        if isinstance(checked, Rejection):
            self._rejections.append(checked)
            return
        named = zip(image_ids(checked.id, len(checked.pictures)), checked.pictures, strict=True)
        try:
            entries = self._register.claim([self._stage.entry(image_id, picture) for image_id, picture in named])
        except RowError as fault:
            self._rejections.append(Rejection(checked.row, checked.id, fault.reason, fault.detail))
            return
        self._looks.update((picture.sha256, picture.look) for picture in checked.pictures)
        self._samples.append(
            {
                "row": checked.row,
                "id": checked.id,
                "image_ids": [entry.id for entry in entries],
                "images": [entry.sha256 for entry in entries],
                "turns": [{"role": turn.role, "text": turn.text} for turn in checked.turns],
            }
        )
        answers = [turn.text for turn in checked.turns if turn.role == "assistant"]
        if len(entries) == 1 and len(answers) == 1:
            self._captions.append((entries[0], answers[0]))

    def require_good_share(self, max_share: float) -> None:
        """Raises: DataFormatError when nothing, or too little, of the source is usable."""
        num_rows = len(self._samples) + len(self._rejections)
        if num_rows == 0:
            raise DataFormatError(
                "The source `captioned_images` is empty: it gave no rows, nothing was written. "
                "Check its file or folder in the catalog, and captions.num_rows."
            )
        share = len(self._rejections) / num_rows
        if share <= max_share and self._samples:
            return
        counts = Counter(rejection.reason for rejection in self._rejections)
        reasons = ", ".join(f"{reason} {count}" for reason, count in counts.most_common())
        examples = "\n".join(
            f"  row {bad.row} ({printable(bad.image_id)}): {bad.reason}: {printable(bad.detail, MAX_DETAIL_CHARACTERS)}"
            for bad in self._rejections[:5]
        )
        raise DataFormatError(
            f"{len(self._rejections)} of {num_rows} rows of `captioned_images` are bad ({share:.1%}); "
            f"quarantine.max_share allows {max_share:.1%} and at least one row must be good. Nothing was published.\n"
            f"By reason: {reasons}. The first:\n{examples}\nMend the source, or raise quarantine.max_share."
        )

    def to_outputs(self, folders: DataFolders) -> Collected:
        return Collected(
            images=ImageStore(folders.stage, self._register.entries, stack_looks(self._looks), published=folders.files),
            samples=self._samples,
            caption_table=self._caption_table(),
            rejected_samples=rejection_table(self._rejections),
        )

    def _caption_table(self) -> pd.DataFrame:
        import pandas as pd

        entries = [entry for entry, _ in self._captions]
        return pd.DataFrame(
            {
                "image_id": text_column(entry.id for entry in entries),
                "image_path": text_column(entry.path for entry in entries),
                "caption": text_column(text for _, text in self._captions),
                "width": pd.Series([entry.width for entry in entries], dtype="int64"),
                "height": pd.Series([entry.height for entry in entries], dtype="int64"),
                "sha256": text_column(entry.sha256 for entry in entries),
            }
        )
