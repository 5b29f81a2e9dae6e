"""Files of records are plain JSON, one record a line."""

import json

import pytest

from qwen_vl_lora.samples.record_files import write_records


@pytest.mark.parametrize("records", [[], [{"id": "一", "turns": []}], [{"a": "line\nbreak"}, {"b": None}, {"c": [1]}]])
def test_what_is_written_reads_back_with_one_line_for_each_record(records, tmp_path):
    file = tmp_path / "records.json"
    write_records(iter(records), file)
    text = file.read_text(encoding="utf-8")
    assert json.loads(text) == records
    assert len(text.splitlines()) == (len(records) + 2 if records else 1)
