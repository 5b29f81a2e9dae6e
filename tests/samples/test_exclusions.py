"""`captions.exclude` leaves out the rows that it names, and no others."""

from __future__ import annotations

import pytest

from qwen_vl_lora.exceptions import DataFormatError, MissingArtifactError
from qwen_vl_lora.samples.collection import collect, take_rows
from qwen_vl_lora.samples.outlook import look_ahead
from qwen_vl_lora.samples.records import Rejection, SourceSample, Turn
from samples.pictures import (
    captions_parameters,
    image_parameters,
    jpeg,
    prompt_parameters,
    quarantine_parameters,
    workspace_folder,
)


def sample(row, name, source=None):
    return SourceSample(
        row, name, (jpeg(row),), (Turn("assistant", f"Picture {row}."),), id_is_given=False, source=source
    )


ROWS = [sample(1, "a.jpg"), sample(2, "=b.jpg"), sample(2, "=b.jpg"), Rejection(3, "c.jpg", "missing_image", "File …")]


@pytest.fixture
def listed(tmp_path):
    """`listed("2,=b.jpg")`: parameters whose list holds these lines."""

    def make(*lines, header="row,image_id,source", **changes):
        (tmp_path / "exclude.csv").write_text("\n".join([header, *lines]), encoding="utf-8")
        return captions_parameters(exclude="exclude.csv", **changes)

    return make


def left_out(captions, project, rows=ROWS):
    taken = take_rows(rows, captions, project)
    return [(row.source, row.row) for row in taken if isinstance(row, Rejection) and row.reason == "excluded"]


def test_all_captions_of_a_named_row_are_left_out(listed, tmp_path):
    assert left_out(listed("2,'=b.jpg,"), tmp_path) == [(None, 2), (None, 2)]
    assert left_out(listed("3,c.jpg", header="row,image_id"), tmp_path) == [(None, 3)]


def test_rows_of_several_sources_are_told_apart(listed, tmp_path):
    rows = [sample(1, "a.jpg", "one"), sample(1, "a.jpg", "two")]
    assert left_out(listed("1,a.jpg,two"), tmp_path, rows) == [("two", 1)]


def test_a_picture_that_got_its_hash_behind_its_name_is_the_same_row(listed, tmp_path):
    assert left_out(listed("1,a.jpg-0123456789ab"), tmp_path) == [(None, 1)]


def test_left_out_rows_are_counted_and_are_no_bad_rows(listed, tmp_path):
    found = collect(
        ROWS[:2], workspace_folder(tmp_path), listed("1,a.jpg"), image_parameters(), quarantine_parameters(0.0)
    )
    assert found.summary["rejected"] == {"excluded": 1}
    assert found.rejected_samples["reason"].tolist() == ["excluded"]
    assert [kept["row"] for kept in found.samples] == [2]


def test_a_plan_leaves_them_out_too(listed, tmp_path):
    ahead = look_ahead(ROWS, listed("1,a.jpg"), image_parameters(), prompt_parameters(), tmp_path)
    assert (len(ahead.conversations), ahead.rejected) == (2, 2)


@pytest.mark.parametrize(
    ("lines", "header", "message"),
    [
        (["1,z.jpg"], "row,image_id", r"row 1 with the image_id 'z.jpg', but row 1 of the source has 'a.jpg'"),
        (["7,a.jpg"], "row,image_id", r"names 1 rows that the source does not have; the first is row 7 \('a.jpg'\)"),
        (["x,a.jpg"], "row,image_id", r"line 2 of .*expected the number of a row in the column row; got 'x'"),
        (["a.jpg"], "image_id", r"lacks the column row; it has image_id"),
        ([], "", r"lacks the column row and image_id; it has no columns"),
    ],
)
def test_a_list_that_does_not_fit_is_refused(listed, tmp_path, lines, header, message):
    with pytest.raises(DataFormatError, match=f"captions.exclude: .*{message}"):
        left_out(listed(*lines, header=header), tmp_path)


def test_rows_that_a_part_of_the_source_does_not_reach_are_no_fault(listed, tmp_path):
    assert left_out(listed("1,a.jpg", "7,z.jpg", num_rows=2), tmp_path) == [(None, 1)]


def test_a_list_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(MissingArtifactError, match=r"captions.exclude: file not found: .*none.csv"):
        left_out(captions_parameters(exclude="none.csv"), tmp_path)
