"""A finished run ends with its figures, whole relative paths, what to check and what to do next."""

import re
from pathlib import Path

import pandas as pd
import pytest
from kedro.pipeline import Pipeline, node

from qwen_vl_lora.pages.language import CHINESE
from qwen_vl_lora.session.results import point_at, tell_results


class Stored:
    """A dataset of the catalog: a file with a value."""

    def __init__(self, path, value=None):
        self._path, self._value = path, value
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

    def exists(self):
        return self._path.exists()

    def existing_path(self):
        return self._path

    def load(self):
        return self._value

    def of_folder(self):
        """The folder of the file in its place."""
        self._path = self._path.parent
        return self


def writes(*names):
    def nothing():
        return names

    return Pipeline([node(nothing, None, list(names), name="nothing")])


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_inference_ends_with_its_table_and_sheet_and_a_place_that_stays(project, capsys):
    version = "2026-11-25T03.52.45.972Z"
    table = project / "data/07_model_output/tiny/captions.csv" / version / "captions.csv"
    sheet = project / "data/07_model_output/tiny/caption_sheet.png" / version / "caption_sheet.png"
    captions = pd.DataFrame({"image": ["a.jpg", "b.jpg"], "caption": ["a dog", None]})
    catalog = {"captions": Stored(table, captions), "caption_sheet": Stored(sheet)}
    tell_results(writes("captions", "caption_sheet"), catalog, project, "tiny")
    lines = capsys.readouterr().out.splitlines()
    assert f"table: data/07_model_output/tiny/captions.csv/{version}/captions.csv" in lines
    assert f"sheet: data/07_model_output/tiny/caption_sheet.png/{version}/caption_sheet.png" in lines
    assert "always the newest: data/08_reporting/tiny/latest/" in lines
    assert lines[-1].startswith("next: open the sheet")
    assert (project / "data/08_reporting/tiny/latest/captions.csv").resolve() == table.resolve()


def test_rejected_rows_near_duplicates_and_left_out_samples_are_counted_in_one_line(project, capsys):
    catalog = {
        "adapter": Stored(project / "a"),
        "training_summary": Stored(
            project / "t", {"steps": 8, "first_loss": 6.4, "last_loss": 1.25, "validation_loss": None}
        ),
        "collection_summary": Stored(project / "c", {"rows": 75, "rejected": {"missing_image": 1, "empty_caption": 2}}),
        "rejected_samples": Stored(project / "rejected.csv"),
        "split_summary": Stored(project / "split.json", {"near_duplicates": {"count": 2}}),
        "left_out_samples": Stored(project / "left_out.csv", pd.DataFrame({"row": [1]})),
    }
    written = ("train_conversations", *catalog)
    tell_results(writes(*written), catalog, project, "tiny")
    said = capsys.readouterr().out
    assert "8 steps: loss 6.4000 → 1.2500, validation loss –" in said
    assert (
        "check: 3 of 75 rows rejected (rejected.csv), 2 near-duplicates on two sides of the split (split.json), "
        "1 sample longer than max_length left out (left_out.csv)\n"
    ) in said
    assert "next: kedro run --pipeline evaluation" in said


@pytest.mark.parametrize("written", ["page", "card", "captions"])
def test_the_terminal_speaks_the_language_of_what_was_written(project, capsys, written):
    page, card = project / "data_page.html", project / "adapter" / "README.md"
    losses = {"steps": 8, "first_loss": 6.4, "last_loss": 1.25, "validation_loss": 1.5}
    captions = pd.DataFrame({"caption": ["一只狗", None]})
    catalog = {
        "page": {"data_page": Stored(page), "train_conversations": Stored(project / "t.json"), "image_sheet": None},
        "card": {"adapter": Stored(card).of_folder(), "training_summary": Stored(project / "t", losses)},
        "captions": {"captions": Stored(project / "c.csv", captions), "caption_sheet": None},
    }[written]
    page.write_text('<html lang="zh-CN">', encoding="utf-8")
    card.write_text(f"- {CHINESE('card_made_by')}", encoding="utf-8")
    tell_results(writes(*catalog), catalog, project, "tiny")
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("下一步：")
    assert [line for line in lines if re.match("[a-z ]+:", line)] == []


def test_what_nothing_made_or_a_catalog_keeps_elsewhere_is_left_out(project, capsys):
    gone = Stored(project / "sheet.png")
    (project / "sheet.png").unlink()
    tell_results(writes("captions"), {"captions": object(), "caption_sheet": gone}, project, "tiny")
    assert capsys.readouterr().out.strip().startswith("next: open the sheet")
    assert not (project / "data").exists()


def test_a_pipeline_without_results_of_its_own_says_nothing(project, capsys):
    tell_results(writes("tiny_base"), {}, project, "tiny")
    assert capsys.readouterr().out == ""


def test_latest_points_at_the_newest(tmp_path):
    latest = tmp_path / "latest"
    for version in ("v1", "v2"):
        page = tmp_path / version / "page.html"
        page.parent.mkdir()
        page.write_text(version)
        point_at([page], latest)
    assert (latest / "page.html").read_text() == "v2"
    assert [path.name for path in latest.iterdir()] == ["page.html"]
    assert not (latest / "page.html").readlink().is_absolute()


def test_a_filesystem_without_links_gets_a_copy(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    (tmp_path / "page.html").write_text("page")
    point_at([tmp_path / "page.html"], tmp_path / "latest")
    assert (tmp_path / "latest" / "page.html").read_text() == "page"
