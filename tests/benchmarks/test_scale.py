"""The measurement of long tables runs a whole data_engineering and reports it."""

import json

import pytest

from benchmarks import scale


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_short_table_is_measured_and_added_to_what_was_measured_before(tmp_path):
    for rows, params in ((60, ""), (40, "image.storage=reference")):
        arguments = ["--rows", str(rows), "--pictures", "20", "--params", params, "--out", str(tmp_path)]
        assert scale.main([*arguments, "--scratch", str(tmp_path)]) == 0
    (file,) = tmp_path.glob("*-scale.json")
    copied, referred = json.loads(file.read_text(encoding="utf-8"))["runs"]
    assert (copied["rows"], referred["rows"]) == (60, 40)
    assert copied["files"].keys() >= {"samples", "conversations", "caption_table", "train_conversations"}
    assert copied["peak_mb"] > 50
    assert "| 40 | image.storage=reference |" in file.with_suffix(".md").read_text(encoding="utf-8")


def test_the_growth_of_a_row_is_told_from_three_sizes():
    runs = [
        {"rows": rows, "params": "", "seconds": 1, "cpu_s": cpu_s, "peak_mb": 1, "load_after": 0, "commit": "c"}
        | {"files": {"samples": {"bytes": 10**6}}}
        for rows, cpu_s in zip(scale.ROWS, (10, 50, 105), strict=True)
    ]
    assert "takes 1.10 of the CPU time before" in scale.render_table("machine", runs)
    assert "takes" not in scale.render_table("machine", runs[:2])
