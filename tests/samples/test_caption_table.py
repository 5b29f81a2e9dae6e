"""The caption table is written row by row, with the bytes that pandas writes of the whole."""

import pytest

from qwen_vl_lora.datasets.tables import SpreadsheetCSVDataset
from qwen_vl_lora.samples.collection import collect
from qwen_vl_lora.samples.records import SourceSample, Turn
from samples.pictures import captions_parameters, image_parameters, jpeg, quarantine_parameters, workspace_folder

TEXTS = ["A dog.", "=1+1", "'=quoted", 'says "hi", twice', "two\nlines", "null", "一只狗"]
CHAT = (Turn("user", "Hello"), Turn("assistant", "Hi."), Turn("user", "Bye"), Turn("assistant", "Bye."))


@pytest.mark.parametrize("texts", [TEXTS, [*TEXTS, "a carriage\rreturn"], []])
def test_rows_are_written_as_pandas_writes_them(tmp_path, texts):
    kept = captions_parameters(collapse_whitespace=False, nothing_words="keep")
    source = [SourceSample(row, f"-{row}", (jpeg(row),), (Turn("assistant", text),)) for row, text in enumerate(texts)]
    source.append(SourceSample(99, "chat", (), CHAT))
    collected = collect(source, workspace_folder(tmp_path), kept, image_parameters(), quarantine_parameters())
    table = collected.caption_table
    assert len(table) == len(list(table)) == len(texts)
    for name, data in {"rows": table, "frame": table.frame()}.items():
        SpreadsheetCSVDataset(filepath=f"{tmp_path}/{name}.csv", save_args={"index": False}).save(data)
    assert (tmp_path / "rows.csv").read_bytes() == (tmp_path / "frame.csv").read_bytes()
