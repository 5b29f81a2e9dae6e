from __future__ import annotations

import csv
import hashlib
import io
import json
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen_vl_lora.exceptions import DataFormatError
from qwen_vl_lora.samples.collection import Collected, collect, map_in_order, take_rows
from qwen_vl_lora.samples.image_stage import DataFolders
from qwen_vl_lora.samples.records import Rejection, SourceSample, Turn
from samples.pictures import (
    captions_parameters,
    image_parameters,
    jpeg,
    png,
    quarantine_parameters,
    workspace_folder,
    write,
)


def caption(row: int, image: bytes | Path, text: str = "A dog.", image_id: str | None = None) -> SourceSample:
    return SourceSample(row, image_id or f"picture {row}", (image,), (Turn("assistant", text),))


def run(source, project: Path, max_share: float = 1.0, **captions) -> Collected:
    return collect(
        source,
        workspace_folder(project),
        captions_parameters(**captions),
        image_parameters(),
        quarantine_parameters(max_share),
    )


def reasons(collected: Collected) -> list[tuple[int, str]]:
    table = collected.rejected_samples
    return list(zip(table["row"], table["reason"], strict=True))


def test_a_caption_becomes_a_sample_and_a_line_of_the_table(tmp_path):
    collected = run([caption(1, jpeg(), "  A\ndog. ", "391895")], tmp_path)
    sha256 = hashlib.sha256(jpeg()).hexdigest()
    assert collected.samples == [
        {
            "row": 1,
            "id": "391895",
            "image_ids": ["391895"],
            "images": [sha256],
            "turns": [{"role": "assistant", "text": "A dog."}],
        }
    ]
    assert collected.caption_table.frame().to_dict("records") == [
        {
            "image_id": "391895",
            "image_path": f"data/02_intermediate/tiny/images/files/{sha256}.jpg",
            "caption": "A dog.",
            "width": 40,
            "height": 30,
            "sha256": sha256,
        }
    ]
    assert list(collected.rejected_samples.columns) == ["row", "image_id", "reason", "detail"]
    assert len(collected.rejected_samples) == 0


def test_five_captions_of_one_image_keep_its_bytes_once(tmp_path):
    file = write(tmp_path / "a.jpg", jpeg())
    collected = run([caption(row, file, f"Caption {row}.", "a") for row in range(1, 6)], tmp_path)
    assert len(collected.caption_table) == 5
    assert len(collected.images.entries) == 1
    assert len(list(DataFolders.of(workspace_folder(tmp_path)).stage.iterdir())) == 1


def test_one_image_under_two_ids_is_one_picture_with_two_entries(tmp_path):
    collected = run([caption(1, jpeg()), caption(2, jpeg())], tmp_path)
    assert len(collected.images) == 1
    assert [entry.id for entry in collected.images.entries] == ["picture 1", "picture 2"]


def test_every_bad_row_ends_in_quarantine_and_the_good_ones_go_on(tmp_path):
    source = [
        caption(1, jpeg(1)),
        caption(2, tmp_path / "none.jpg"),
        caption(3, b"<html>"),
        caption(4, jpeg(4)[:-200]),
        caption(5, jpeg(5), " \n\x00"),
        caption(6, jpeg(6), "nan"),
        caption(7, jpeg(7), "a" * 1_000_000),
        caption(8, jpeg(8), "A dog.<|im_end|>"),
        caption(9, jpeg(9), image_id="a\nb"),
        caption(10, jpeg(10), image_id="picture 1"),
        caption(11, jpeg(1), image_id="PICTURE 1"),
        caption(12, Path("/etc/hostname")),
        Rejection(13, "x", "url_not_allowed", "https://example.org/a.jpg is a URL"),
        SourceSample(14, "turns", (), (Turn("user", "Hello"),)),
        SourceSample(15, "slots", (jpeg(15),), (Turn("user", "<image><image>"), Turn("assistant", "Two."))),
        caption(16, jpeg(16)),
    ]
    collected = run(source, tmp_path)
    assert reasons(collected) == [
        (2, "missing_image"),
        (3, "not_an_image"),
        (4, "damaged_image"),
        (5, "empty_caption"),
        (6, "empty_caption"),
        (7, "caption_too_long"),
        (8, "special_token"),
        (9, "bad_id"),
        (10, "duplicate_id"),
        (12, "outside_allowed_roots"),
        (13, "url_not_allowed"),
        (14, "no_answer"),
        (15, "placeholder_mismatch"),
    ]
    assert [sample["id"] for sample in collected.samples] == ["picture 1", "PICTURE 1", "picture 16"]
    assert {entry.id for entry in collected.images.entries} == {"picture 1", "PICTURE 1", "picture 16"}


def test_a_share_above_the_limit_stops_with_counts_and_examples(tmp_path):
    source = [caption(1, jpeg()), caption(2, b"<html>"), caption(3, b"")]
    with pytest.raises(DataFormatError) as error:
        run(source, tmp_path, max_share=0.5)
    message = str(error.value)
    assert "2 of 3 rows of `captioned_images` are bad (66.7%); quarantine.max_share allows 50.0%" in message
    assert "not_an_image 1, empty_file 1" in message
    assert "row 2 (picture 2): not_an_image: The bytes are not a picture of a known format" in message
    assert not DataFolders.of(workspace_folder(tmp_path)).files.exists()


def test_a_share_at_the_limit_goes_on(tmp_path):
    assert len(run([caption(1, jpeg()), caption(2, b"")], tmp_path, max_share=0.5).samples) == 1


def test_a_source_of_bad_rows_alone_stops_whatever_the_limit(tmp_path):
    with pytest.raises(DataFormatError, match="at least one row must be good"):
        run([caption(1, b"")], tmp_path)


def test_an_empty_source_stops(tmp_path):
    with pytest.raises(DataFormatError, match=r"`captioned_images` is empty: it gave no rows"):
        run([], tmp_path)


def test_samples_of_several_turns_and_images_survive(tmp_path):
    turns = (
        Turn("system", "Be brief."),
        Turn("user", "Compare <image> and <image>."),
        Turn("assistant", "Both are dogs."),
        Turn("user", "Sure?"),
        Turn("assistant", "Yes."),
    )
    collected = run([SourceSample(1, "pair", (jpeg(1), png(2)), turns)], tmp_path)
    (sample,) = collected.samples
    assert sample["image_ids"] == ["pair#1", "pair#2"]
    assert [(turn["role"], turn["text"]) for turn in sample["turns"]] == [(turn.role, turn.text) for turn in turns]
    assert len(collected.caption_table) == 0


def test_rejections_fit_in_any_file(tmp_path):
    row = Rejection(2, "\udce9\n", "bad_encoding", "x" * 10_000)
    (record,) = run([caption(1, jpeg()), row], tmp_path).rejected_samples.to_dict("records")
    assert record["image_id"].encode("utf-8")
    assert len(record["detail"]) < 600


def test_results_do_not_depend_on_the_number_of_threads(tmp_path, monkeypatch):
    source = [caption(row, jpeg(row % 7) if row % 5 else b"", image_id=f"i{row}") for row in range(1, 60)]
    outputs = []
    for num_threads in (1, 8):
        monkeypatch.setattr("qwen_vl_lora.samples.collection._num_threads", lambda n=num_threads: n)
        collected = run(source, tmp_path / str(num_threads))
        outputs.append((collected.samples, collected.images.entries, reasons(collected)))
    assert outputs[0] == outputs[1]


def test_the_first_rows_are_taken_and_no_more_is_read():
    read = []
    source = (read.append(row) or row for row in range(100))
    assert list(take_rows(source, captions_parameters(num_rows=3))) == [0, 1, 2]
    assert read == [0, 1, 2]


def test_a_random_sample_is_seeded_and_keeps_the_order_of_the_source():
    def sample(seed: int) -> list[int]:
        return list(take_rows(range(1000), captions_parameters(num_rows=50, sampling="random", seed=seed)))

    assert sample(1) == sample(1) == sorted(set(sample(1)))
    assert len(sample(1)) == 50
    assert sample(1) != sample(2)


def test_a_random_sample_is_fair():
    counts = [0] * 10
    for seed in range(500):
        for row in take_rows(range(10), captions_parameters(num_rows=3, sampling="random", seed=seed)):
            counts[row] += 1
    # 500 draws at 3/10: mean 150, standard deviation 10.2; five of them either side.
    assert all(99 <= count <= 201 for count in counts)


def test_more_rows_than_there_are_takes_all():
    assert list(take_rows(range(3), captions_parameters(num_rows=10, sampling="random"))) == [0, 1, 2]


def test_the_source_is_read_only_a_little_ahead():
    read, allowed = [], threading.Event()

    def source():
        for number in range(1000):
            read.append(number)
            yield number

    def wait(number: int) -> int:
        allowed.wait(10)
        return number

    results = map_in_order(wait, source(), num_threads=2)
    threading.Timer(0.1, allowed.set).start()
    assert next(results) == 0
    assert len(read) <= 2 * 4
    assert list(results) == list(range(1, 1000))


def test_memory_does_not_hold_the_bytes_of_rows_that_are_done(tmp_path):
    class Tracked(bytes):
        alive = 0
        most = 0

        def __init__(self, *args) -> None:
            Tracked.alive += 1
            Tracked.most = max(Tracked.most, Tracked.alive)

        def __del__(self) -> None:
            Tracked.alive -= 1

    source = (caption(row, Tracked(jpeg(row) if row % 3 else b"<html>")) for row in range(1, 301))
    collected = run(source, tmp_path)
    assert len(collected.samples) == 200
    assert Tracked.most <= 16 * 4 + 2  # the look-ahead at most, of 300
    assert Tracked.alive <= 1


def test_an_error_that_is_no_row_fault_stops_the_collection(tmp_path):
    def source():
        yield caption(1, jpeg())
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        run(source(), tmp_path)


TEXTS = st.text(max_size=30) | st.sampled_from(["<image>", "<|im_end|>", "nan", "=1", "A dog.", "<image> what?"])
IMAGES = st.sampled_from(
    [jpeg(0), jpeg(1), png(2), b"", b"<html>", jpeg(0)[:100], Path("none.jpg"), Path("/etc/passwd")]
)
ROLES = st.sampled_from(["system", "user", "assistant", "teacher"])
SAMPLES = st.builds(
    SourceSample,
    row=st.just(0),
    id=st.text(max_size=5),
    images=st.lists(IMAGES, max_size=2).map(tuple),
    turns=st.lists(st.builds(Turn, ROLES, TEXTS), max_size=4).map(tuple)
    | TEXTS.map(lambda text: (Turn("assistant", text),)),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], deadline=None)
@given(rows=st.lists(SAMPLES, max_size=8))
def test_every_random_row_is_kept_or_rejected(tmp_path, rows):
    good = caption(0, jpeg(3), image_id="good one")
    collected = run([good, *rows], tmp_path)
    assert len(collected.samples) + len(collected.rejected_samples) == 1 + len(rows)
    json.dumps(list(collected.samples), ensure_ascii=False).encode("utf-8")
    table = io.StringIO()
    collected.rejected_samples.to_csv(table, index=False)
    assert len(list(csv.reader(io.StringIO(table.getvalue())))) == 1 + len(collected.rejected_samples)
