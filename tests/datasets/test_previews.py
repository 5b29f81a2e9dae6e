"""What Kedro-Viz shows is small, safe to put into its page, and costs no download."""

import base64
import inspect
import io
import json

import pytest
from PIL import Image

from qwen_vl_lora.datasets import previews
from qwen_vl_lora.datasets.tables import SpreadsheetCSVDataset
from samples.test_data_page import GOOD, found_in


def test_a_picture_is_shown_as_a_png_that_is_not_too_large(tmp_path):
    Image.new("RGB", (3000, 1000), "teal").save(tmp_path / "sheet.png")
    shown = previews.PictureDataset(filepath=str(tmp_path / "sheet.png")).preview()
    with Image.open(io.BytesIO(base64.b64decode(shown))) as picture:
        assert picture.format == "PNG"
        assert picture.size == (1400, 467)


def test_a_long_list_is_shown_by_its_first_records(tmp_path):
    (tmp_path / "long.json").write_text(json.dumps([{"text": f"猫 {number}"} for number in range(1000)]))
    shown = previews.RecordsDataset(filepath=str(tmp_path / "long.json")).preview(nrows=2)
    assert json.loads(shown) == [{"text": "猫 0"}, {"text": "猫 1"}]


def test_the_report_is_shown_without_what_would_act_on_the_page_around_it():
    card = '<article class="card" data-id="1"><img src="data:image/webp;base64,AA"><p class="x">a_b *c*</p></article>'
    page = (
        "<html><head><style>body{display:none}</style></head><body><h1 id='x'>CIDEr</h1>"
        '<td>0.5<span class="interval">0.4 … 0.6</span></td><form role="search"><input></form>'
        f"{card * 20}<script>alert(1)</script></body></html>"
    )
    shown = previews.excerpt(page)
    assert shown.count("<article") == previews.NUM_CARDS
    assert "0.5 (0.4 … 0.6)" in shown
    for unwanted in ("<script", "<style", "<form", "class=", "data-id", "_", "*"):
        assert unwanted not in shown, unwanted


def test_a_table_without_rows_says_so(tmp_path):
    (tmp_path / "empty.csv").write_text("row,reason\n")
    (tmp_path / "one.csv").write_text("row,reason\n1,empty_caption\n")
    empty, one = (SpreadsheetCSVDataset(filepath=str(tmp_path / name)).preview() for name in ("empty.csv", "one.csv"))
    assert (empty["columns"], empty["data"]) == (["row", "reason"], [["no row", ""]])
    assert one["data"] == [[1, "empty_caption"]]


def test_the_data_page_is_shown_by_its_first_rows(tmp_path):
    _, page = found_in(tmp_path, [*GOOD, *GOOD])
    shown = previews.excerpt(page)
    assert shown.count("<article") == previews.NUM_CARDS
    assert "24 samples of 12 pictures, 12 rows to look at" in shown
    for unwanted in ("<script", "<style", "<form", "<input", "<button", "class=", "data-row"):
        assert unwanted not in shown, unwanted
    _, page = found_in(tmp_path, GOOD)
    assert "No row is rejected" in previews.excerpt(page)


def test_the_card_of_a_model_on_disk_needs_no_weights_in_memory(base_path):
    facts = dict(previews.BaseModelCardDataset(model=str(base_path("qwen2_5_vl"))).preview()["data"])
    assert facts["family"] == "qwen2_5_vl"
    assert facts["language model"] == "2 layers of 64"
    assert facts["parameters"].endswith(" million")


def test_a_base_that_is_not_here_yet_is_not_fetched_for_its_card(monkeypatch, tmp_path):
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path))
    monkeypatch.setattr(previews.BaseModelCardDataset, "load", lambda self: pytest.fail("it was fetched"))
    facts = dict(previews.BaseModelCardDataset(model="Qwen/Qwen2-VL-2B-Instruct@master").preview()["data"])
    assert facts["model"] == "Qwen/Qwen2-VL-2B-Instruct@master"
    assert facts["state"].startswith("not here yet")


@pytest.mark.parametrize(
    ("dataset", "annotation"),
    [
        ("PictureDataset", "ImagePreview"),
        ("RecordsDataset", "JSONPreview"),
        ("ReportDataset", "HTMLPreview"),
        ("AdapterCardDataset", "TablePreview"),
        ("ImageTableDataset", "TablePreview"),
        ("BaseModelCardDataset", "TablePreview"),
        ("ModelDirectoryDataset", "TablePreview"),
    ],
)
def test_the_annotation_names_kedro_vizs_renderer(dataset, annotation):
    assert inspect.signature(getattr(previews, dataset).preview).return_annotation == annotation
