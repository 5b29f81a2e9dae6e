from __future__ import annotations

import json
import logging

import pytest

from qwen_vl_lora.samples import lettering, statistics
from qwen_vl_lora.samples.collection import collect
from qwen_vl_lora.samples.image_store import ImageStore
from qwen_vl_lora.samples.records import SourceSample, Turn
from qwen_vl_lora.samples.statistics import (
    MAX_BARS,
    SHEET_COLUMNS,
    THUMBNAIL_SIDE,
    describe_captions,
    draw_sheet,
)
from samples.fonts import StrictFont
from samples.pictures import captions_parameters, image_parameters, jpeg, quarantine_parameters, workspace_folder


def described(project, captions: list[tuple[int, str]]):
    """Describe captions of pictures, given as (number of the picture, text)."""
    source = [
        SourceSample(row, f"picture {seed}", (jpeg(seed, (40 + seed, 30)),), (Turn("assistant", text),))
        for row, (seed, text) in enumerate(captions, start=1)
    ]
    collected = collect(
        source, workspace_folder(project), captions_parameters(), image_parameters(), quarantine_parameters()
    )
    return describe_captions(collected.samples, collected.images, collected.summary)


def test_numbers_count_rows_images_and_lengths(tmp_path):
    statistics = described(tmp_path, [(0, "A dog."), (0, "A dog runs."), (1, "A dog."), (2, "一只狗在跑")]).statistics
    assert statistics["rows"] == 4
    assert statistics["images"] == 3
    assert statistics["captions_per_image"] == {"1": 2, "2": 1}
    assert statistics["duplicate_captions"] == 1
    assert statistics["words"]["p100"] == 3
    assert statistics["characters"]["p0"] == 5
    assert (statistics["width"]["p0"], statistics["width"]["p50"], statistics["width"]["p100"]) == (40, 41, 42)
    json.dumps(statistics, allow_nan=False)


def test_the_plot_does_not_grow_with_the_captions(tmp_path):
    figure = described(tmp_path, [(0, "word " * number) for number in range(1, 300)]).length_plot
    assert all(len(bars.x) <= MAX_BARS for bars in figure.data)
    assert [sum(bars.y) for bars in figure.data] == [299, 299]


@pytest.mark.parametrize("num_images", [1, 9, 60])
def test_the_sheet_shows_up_to_48_pictures(tmp_path, num_images):
    sheet = described(tmp_path, [(seed, "A dog.") for seed in range(num_images)]).sheet
    assert sheet.width >= min(num_images, SHEET_COLUMNS) * THUMBNAIL_SIDE
    assert sheet.height <= 6 * (THUMBNAIL_SIDE + 60)
    assert sheet.getextrema() != ((255, 255),) * 3


def test_no_captions_at_all_are_described_too(tmp_path):
    collected = collect(
        [SourceSample(1, "a", (), (Turn("user", "Hello"), Turn("assistant", "Hi.")))],
        workspace_folder(tmp_path),
        captions_parameters(),
        image_parameters(),
        quarantine_parameters(),
    )
    description = describe_captions(collected.samples, collected.images, {})
    assert description.statistics["rows"] == description.statistics["images"] == 0
    assert description.statistics["words"] == {}


def test_a_caption_that_pandas_takes_for_missing_counts_as_it_is(tmp_path):
    source = [SourceSample(1, "a", (jpeg(),), (Turn("assistant", "null"),))]
    kept = captions_parameters(nothing_words="keep")
    collected = collect(source, workspace_folder(tmp_path), kept, image_parameters(), quarantine_parameters())
    described = describe_captions(collected.samples, collected.images, collected.summary)
    assert described.statistics["characters"]["p50"] == 4


@pytest.mark.parametrize("fonts", ["of this machine", "that refuse controls"])
def test_captions_whose_line_breaks_are_kept_are_shown(tmp_path, monkeypatch, fonts):
    if fonts == "that refuse controls":
        monkeypatch.setattr(lettering, "_fonts", lambda size: [StrictFont(size)])
    kept = captions_parameters(collapse_whitespace=False)
    source = [
        SourceSample(row, str(row), (jpeg(row),), (Turn("assistant", text),))
        for row, text in enumerate(["A dog.\n\nIt runs.", "A\tcat\x0b\x0cor two.", "One\r\nTwo\u2029Three"])
    ]
    collected = collect(source, workspace_folder(tmp_path), kept, image_parameters(), quarantine_parameters())
    assert describe_captions(collected.samples, collected.images, collected.summary).statistics["rows"] == 3
    captions = {image.sha256: "A dog.\n\nIt runs.\t\x00" for image in collected.images}  # as inference writes them
    assert draw_sheet(captions, collected.images).width > THUMBNAIL_SIDE


def test_a_picture_that_is_gone_costs_its_field_and_one_line(tmp_path, monkeypatch, caplog):
    source = [SourceSample(row, str(row), (jpeg(row),), (Turn("assistant", "A dog."),)) for row in range(2)]
    images = collect(
        source, workspace_folder(tmp_path), captions_parameters(), image_parameters(), quarantine_parameters()
    ).images

    def fail(self, sha256):
        raise FileNotFoundError(sha256)

    monkeypatch.setattr(ImageStore, "open", fail)
    with caplog.at_level(logging.WARNING):
        sheet = draw_sheet({}, images)
    assert "#{:02x}{:02x}{:02x}".format(*sheet.getpixel((80, 80))) == statistics.EMPTY
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("2 parts of the contact sheet could not be drawn")
