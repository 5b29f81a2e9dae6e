"""Turns the rows of a source into samples. Every row is either kept or rejected with a reason.

Rows are streamed: texts are checked first, then pictures, by several threads with a bounded look-ahead or by several
processes, so memory does not grow with the size of the pictures. Nothing is published here; the bytes stay on the stage
until the `images` dataset is saved.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import random
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from qwen_vl_lora.cluster.work import Processes
from qwen_vl_lora.exceptions import DataFormatError
from qwen_vl_lora.parameters import (
    ONE_PROCESS,
    CaptionsParameters,
    ClusterParameters,
    ImageParameters,
    QuarantineParameters,
)
from qwen_vl_lora.runs.run import Work, recorded_work
from qwen_vl_lora.samples.caption_table import CaptionTable
from qwen_vl_lora.samples.exclusions import leave_out
from qwen_vl_lora.samples.identity import ImageRegister, check_id, image_ids
from qwen_vl_lora.samples.image_stage import DataFolders, Fetch, ImageStage, Picture
from qwen_vl_lora.samples.image_store import ImageStore
from qwen_vl_lora.samples.looks import stack_looks
from qwen_vl_lora.samples.record_files import Records, RecordsInTheMaking
from qwen_vl_lora.samples.records import Rejection, Row, RowError, SourceSample, Turn
from qwen_vl_lora.samples.rejections import MAX_DETAIL_CHARACTERS, rejection_table
from qwen_vl_lora.samples.source import Reading, as_source
from qwen_vl_lora.samples.tally import Tally
from qwen_vl_lora.samples.texts import printable
from qwen_vl_lora.samples.turns import clean_turns
from qwen_vl_lora.samples.workspace import Workspace

if TYPE_CHECKING:
    import pandas as pd

LOOK_AHEAD = 4
"""Rows in progress per thread: enough to keep the threads busy, few enough to bound the bytes in memory."""

PIECE_ROWS, _PIECE_BYTES = 256, 16 * 2**20
"""Rows, and bytes of their pictures, that another process is given at once."""

CAPTION_FORMS = ("caption", "coco")
"""Forms whose texts are one caption; the others are chats, whose line breaks are meaningful."""

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class Collected(NamedTuple):
    """The outputs of a collection, in the order in which the pipeline names them.

    Attributes:
        images: staged pictures; saving the `images` dataset publishes them.
        samples: `{"row", "id", "image_ids", "images": [sha256, …], "turns": [{"role", "text"}, …]}`, in a temporary
            file.
        caption_table: a row for each sample of one picture and one answer.
        rejected_samples: a row for each row of the source that is not in `samples`.
        rejected_pictures: `{"row", "image_id", "source", "picture": data URI or null}` of rejected rows whose picture
            is no fault, and of rows that the user left out.
        summary: `collection_summary`: counts of what was kept, rejected, changed, ignored and suspicious.
    """

    images: ImageStore
    samples: Records
    caption_table: CaptionTable
    rejected_samples: pd.DataFrame
    rejected_pictures: list[dict[str, Any]]
    summary: dict[str, Any]


class _Checked(NamedTuple):
    """What is known of a sample with valid texts and pictures; its turns are cleaned."""

    pictures: tuple[Picture, ...]
    turns: tuple[Turn, ...]


_Outcome = _Checked | Rejection
_CheckedRows = Iterator[tuple[Row, _Outcome]]


def collect(
    source: Iterable[Row],
    workspace: Workspace,
    captions: CaptionsParameters,
    image: ImageParameters,
    quarantine: QuarantineParameters,
    fetch: Fetch | None = None,
    cluster: ClusterParameters = ONE_PROCESS,
) -> Collected:
    """Check and stage all rows of a source. The result is the same for any number of processes.

    Pictures on the network are fetched by the rules of the source, or by `fetch` if the caller gives it; such a source
    is checked by this process alone.

    Raises:
        ClusterError: when processes hang or die again and again.
        DataFormatError: when the source gives no rows, or a larger share of bad ones than
            `quarantine.max_share`.
        OSError: when the stage cannot be written.
    """
    folders = DataFolders.of(workspace)
    source = as_source(source).read_as(Reading.of(captions, image))
    fetcher = None if fetch else source.fetcher(image)
    stage = ImageStage(folders, image, source.folders, fetcher.fetch if fetcher else fetch)
    with RecordsInTheMaking(folders.stage) as samples:
        gathered = _Gathered(stage, samples)
        rows = take_rows(source, captions, folders.project)
        with recorded_work("collect_samples", "rows") as work:
            processes = None if stage.fetches else Processes(cluster, None)
            if processes is None or processes.count == 1:
                checked = _checked_here(rows, stage, captions, work)
            else:
                check = PictureChecker(folders, image, source.folders, captions)
                checked = _checked_in_pieces(rows, check, processes, work)
            gathered.add_all(checked, captions, "collect_samples")
        gathered.require_good_share(quarantine.max_share)
        stage.finish()
        return gathered.to_outputs(folders, captions)


def look_over(source: Iterable[Row], project: Path, captions: CaptionsParameters, image: ImageParameters) -> Collected:
    """Return what `collect` would return, for any share of bad rows, without writing or fetching anything.

    Raises:
        DataFormatError: when the source as a whole cannot be read.
    """
    source = as_source(source).read_as(Reading.of(captions, image))
    folders = DataFolders(project, project, project)
    with RecordsInTheMaking() as samples:
        stage = ImageStage(folders, image, source.folders, writes=False)
        gathered = _Gathered(stage, samples)
        gathered.add_all(_checked_here(take_rows(source, captions, project), stage, captions), captions, "look")
        return gathered.to_outputs(folders, captions)


def collapses_whitespace(form: str, captions: CaptionsParameters) -> bool:
    """Whether runs of blanks and line breaks in the texts of a form become one blank; by default not in chats."""
    asked = captions.collapse_whitespace
    return form in CAPTION_FORMS if asked == "auto" else asked


def take_rows(source: Iterable[Row], captions: CaptionsParameters, project: Path = Path()) -> Iterator[Row]:
    """Yield the rows that `captions` selects, in the source's order; those of `captions.exclude` as rejected.

    Args:
        project: the folder from which a relative path of `captions.exclude` starts.

    Raises:
        DataFormatError: when the list of `captions.exclude` belongs to another source.
    """
    rows = _selected_rows(source, captions)
    if captions.exclude is None:
        return rows
    return leave_out(rows, project / captions.exclude, all_rows=captions.num_rows is None)


def _selected_rows(source: Iterable[Row], captions: CaptionsParameters) -> Iterator[Row]:
    """Yield the rows of `captions.num_rows`.

    A random sample is drawn in one pass over a source of any length and keeps `num_rows` rows
    in memory, with their bytes where the source gives bytes and not paths.
    """
    if captions.num_rows is None or captions.sampling == "first":
        yield from islice(source, captions.num_rows)
        return
    rng = random.Random(captions.seed)
    chosen: list[tuple[int, Row]] = []
    for number, row in enumerate(source):
        if number < captions.num_rows:
            chosen.append((number, row))
        elif (place := rng.randrange(number + 1)) < captions.num_rows:
            chosen[place] = (number, row)
    chosen.sort(key=lambda numbered: numbered[0])
    yield from (row for _, row in chosen)


def map_in_order(function: Callable[[_Item], _Result], items: Iterable[_Item], num_threads: int) -> Iterator[_Result]:
    """Apply a function in threads and yield the results in the order of the items.

    At most `num_threads * LOOK_AHEAD` items are read ahead of the yielded result.
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
    # Reading and decoding release the interpreter lock; more threads than cores would only compete for it.
    return max(2, min(16, os.cpu_count() or 1))


def _checked_here(
    rows: Iterable[Row], stage: ImageStage, captions: CaptionsParameters, work: Work | None = None
) -> _CheckedRows:
    """Check rows with threads of this process; yield each with its outcome, in their order."""
    for checked in map_in_order(lambda row: (row, _check_row(row, stage, captions)), rows, _num_threads()):
        if work is not None:
            work.add(1)
        yield checked


def _checked_in_pieces(rows: Iterable[Row], check: PictureChecker, processes: Processes, work: Work) -> _CheckedRows:
    """Check rows with other processes; yield each with its outcome, in their order."""
    given: dict[int, list[Row]] = {}
    finished: dict[int, list[_Outcome]] = {}

    def pieces() -> Iterator[list[Row]]:
        for number, piece in enumerate(_cut(rows)):
            given[number] = piece
            yield piece

    following = 0
    for done in processes.in_pieces(check, pieces()):
        finished[done.number] = done.result
        work.add(len(done.result), done.process)
        while following in finished:
            yield from zip(given.pop(following), finished.pop(following), strict=True)
            following += 1


def _cut(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Cut rows into pieces, by their number and by the bytes of their pictures."""
    piece: list[Row] = []
    num_bytes = 0
    for row in rows:
        piece.append(row)
        if isinstance(row, SourceSample):
            num_bytes += sum(len(image) for image in row.images if isinstance(image, bytes))
        if len(piece) >= PIECE_ROWS or num_bytes >= _PIECE_BYTES:
            yield piece
            piece, num_bytes = [], 0
    if piece:
        yield piece


class PictureChecker:
    """Checks pieces of a source in one of several processes. Can be pickled until its first call.

    What it finds out about pictures is kept on the stage before a piece counts as done.
    """

    def __init__(
        self, folders: DataFolders, image: ImageParameters, source_folders: Sequence[Path], captions: CaptionsParameters
    ) -> None:
        self._arguments = folders, image, source_folders
        self._captions = captions

    def __call__(self, rows: list[Row]) -> list[_Outcome]:
        outcomes = [outcome for _, outcome in _checked_here(rows, self._stage, self._captions)]
        self._stage.save_checked()
        return outcomes

    @functools.cached_property
    def _stage(self) -> ImageStage:
        return ImageStage(*self._arguments)


def _check_row(row: Row, stage: ImageStage, captions: CaptionsParameters) -> _Outcome:
    if isinstance(row, Rejection):
        return row
    try:
        if row.id_is_given:
            check_id(row.id)
        turns = clean_turns(
            row.turns,
            len(row.images),
            collapse_whitespace=collapses_whitespace(row.form, captions),
            keep_nothing_words=captions.nothing_words == "keep",
        )
        pictures = tuple(stage.add(image) for image in row.images)
    except RowError as fault:
        return Rejection(row.row, row.id, fault.reason, fault.detail, row.source)
    return _Checked(pictures, turns)


class _Gathered:
    """The state of a collection: what it knows of each picture and each rejection. Samples go to a file."""

    def __init__(self, stage: ImageStage, samples: RecordsInTheMaking) -> None:
        self._stage = stage
        self._register = ImageRegister()
        self._pictures: dict[str, Picture] = {}
        self._samples = samples
        self._num_samples = self._num_captions = 0
        self._has_carriage_return = False
        self._rejections: list[Rejection] = []
        self._tally = Tally()

    def add_all(self, checked_rows: _CheckedRows, captions: CaptionsParameters, name: str) -> None:
        """Add rows as they are checked, with a named progress bar."""
        from tqdm import tqdm

        bar = tqdm(checked_rows, total=captions.num_rows, desc=name, unit="row", leave=False, disable=None)
        for row, outcome in bar:
            if isinstance(row, Rejection):
                self._rejections.append(row)
            elif isinstance(outcome, Rejection):
                self._reject(row, outcome)
            else:
                self._add(row, outcome)

    def _reject(self, given: SourceSample, rejection: Rejection) -> None:
        picture = self._stage.thumbnail(given.images[0]) if given.images else None
        self._rejections.append(dataclasses.replace(rejection, picture=picture))

    def _add(self, given: SourceSample, checked: _Checked) -> None:
        # One object for each picture, with the place that its first row names, whichever processes found it.
        pictures = [self._pictures.setdefault(picture.sha256, picture) for picture in checked.pictures]
        named = zip(image_ids(given.id, len(pictures)), pictures, strict=True)
        try:
            claimed = [self._stage.entry(image_id, picture) for image_id, picture in named]
            entries = self._register.claim(claimed, may_rename=not given.id_is_given)
        except RowError as fault:
            self._reject(given, Rejection(given.row, given.id, fault.reason, fault.detail, given.source))
            return
        self._samples.append(
            {
                "row": given.row,
                "id": entries[0].id if len(entries) == 1 else given.id,
                "image_ids": [entry.id for entry in entries],
                "images": [entry.sha256 for entry in entries],
                "turns": [_record_of(turn) for turn in checked.turns],
                **({} if given.split is None else {"split": given.split}),
                **({} if given.source is None else {"source": given.source}),
            }
        )
        self._num_samples += 1
        self._tally.add(given, checked.turns, pictures, entries)
        answers = [turn.text for turn in checked.turns if turn.role == "assistant"]
        if len(entries) == 1 and len(answers) == 1:
            self._num_captions += 1
            self._has_carriage_return |= "\r" in answers[0]

    def require_good_share(self, max_share: float) -> None:
        """Raises: DataFormatError when no rows, or too few, are usable."""
        num_rows = self._tally.rows + len(self._rejections)
        if num_rows == 0:
            raise DataFormatError(
                "The source `captioned_images` is empty: it gave no rows, nothing was written. "
                "Check its file or folder in the catalog, and captions.num_rows."
            )
        bad_rows = [rejection for rejection in self._rejections if rejection.reason != "excluded"]
        share = len(bad_rows) / num_rows
        if share <= max_share and self._num_samples:
            return
        counts = Counter(rejection.reason for rejection in bad_rows)
        reasons = ", ".join(f"{reason} {count}" for reason, count in counts.most_common())
        examples = "\n".join(
            f"  row {bad.row} ({printable(bad.image_id)}): {bad.reason}: {printable(bad.detail, MAX_DETAIL_CHARACTERS)}"
            for bad in bad_rows[:5]
        )
        raise DataFormatError(
            f"{len(bad_rows)} of {num_rows} rows of `captioned_images` are bad ({share:.1%}); "
            f"quarantine.max_share allows {max_share:.1%} and at least one row must be good. Nothing was published.\n"
            f"By reason: {reasons}. First rows:\n{examples}\nFix the source, or raise quarantine.max_share."
        )

    def to_outputs(self, folders: DataFolders, captions: CaptionsParameters) -> Collected:
        images = ImageStore(
            folders.stage,
            self._register.entries,
            stack_looks({name: each.look for name, each in self._pictures.items()}),
            published=folders.files,
        )
        samples = self._samples.finish()
        return Collected(
            images=images,
            samples=samples,
            caption_table=CaptionTable(samples, images, self._num_captions, self._has_carriage_return),
            rejected_samples=rejection_table(self._rejections),
            rejected_pictures=[
                {"row": bad.row, "image_id": printable(bad.image_id), "source": bad.source, "picture": bad.picture}
                for bad in self._rejections
                if bad.picture is not None or bad.reason == "excluded"
            ],
            summary=self._tally.summary(samples, self._rejections, lambda form: collapses_whitespace(form, captions)),
        )


def _record_of(turn: Turn) -> dict[str, Any]:
    """Return a turn for `samples`. `loss` (ms-swift's name) is present only if an answer is not trained."""
    return {"role": turn.role, "text": turn.text, **({} if turn.scored else {"loss": False})}
