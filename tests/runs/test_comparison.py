"""The first thing that differs is named; surroundings explain, they do not differ by themselves."""

from qwen_vl_lora.runs.comparison import compare_runs, differing_settings, differing_surroundings
from qwen_vl_lora.runs.records import Record


def a_run(tmp_path, **changes):
    facts = {
        "id": "r1",
        "recipe": "tiny",
        "outcome": "finished",
        "parameters": {"lora": {"r": 4}, "seed": 1},
        "datasets": {
            "read": {"base_model": {"version": None, "path": "b", "sha256": "1", "files": {"model.safetensors": "1"}}},
            "written": {name: {"version": "v1", "path": name, "sha256": name} for name in ("samples", "adapter")},
        },
    }
    return Record(tmp_path, {**facts, **changes})


def test_equal_runs_do_not_differ(tmp_path):
    assert not compare_runs(a_run(tmp_path), a_run(tmp_path, id="r2"), tmp_path).are_there


def test_artifacts_are_named_in_the_order_of_the_data_flow(tmp_path):
    written = {name: {"version": "v2", "path": name, "sha256": "other"} for name in ("adapter", "samples")}
    other = a_run(tmp_path, datasets={"read": {}, "written": written})
    found = compare_runs(a_run(tmp_path), other, tmp_path).artifacts
    assert [line.split(":")[0] for line in found] == ["base_model", "samples", "adapter"]


def test_a_changed_file_of_the_base_is_named(tmp_path):
    base = {"version": None, "path": "b", "sha256": "2", "files": {"model.safetensors": "2"}}
    other = a_run(tmp_path, datasets={"read": {"base_model": base}, "written": a_run(tmp_path).written})
    assert compare_runs(a_run(tmp_path), other, tmp_path).artifacts == [
        "base_model: different bytes in model.safetensors"
    ]


def test_settings_are_named_by_their_dotted_key():
    assert differing_settings({"lora": {"r": 4, "bias": "none"}}, {"lora": {"r": 8, "bias": "none"}}) == [
        "lora.r: 4 → 8"
    ]
    assert differing_settings({"a": {}}, {"b": None}) == ["a: {} → not set", "b: not set → None"]


def test_surroundings_that_one_side_does_not_know_are_left_out():
    one = {"packages": {"torch": "2.15"}, "threads": 2, "git": None, "code_sha256": "a"}
    two = {"packages": {"torch": "2.16"}, "threads": None, "git": {"commit": "c"}, "code_sha256": "b"}
    assert differing_surroundings(one, two) == ["torch: 2.15 → 2.16", "code_sha256: a → b"]


def test_a_run_of_a_version_that_rounds_otherwise_says_that_bits_differ():
    old, now = {"code_sha256": "a"}, {"code_sha256": "a", "arithmetic": 2}  # the first version recorded none
    (told,) = differing_surroundings(old, now)
    assert told.startswith("arithmetic: 1 → 2 ")
    assert "not bit for bit" in told
    assert differing_surroundings(now, now) == differing_surroundings(old, old) == []
