"""Hashes say what an artifact is; timings and run ids do not count between runs."""

import json

from qwen_vl_lora.runs.artifacts import describe_artifact, fault_of, first_difference


def test_the_log_without_its_timing_column_is_the_same(tmp_path):
    described = []
    for name, speed in (("a", 3.5), ("b", 7.25)):
        (tmp_path / name).write_text(f"step,loss,samples_per_second\n1,0.5,{speed}\n")
        described.append(describe_artifact("training_log", tmp_path / name, tmp_path, name))
    assert described[0]["sha256"] != described[1]["sha256"]
    assert described[0]["content_sha256"] == described[1]["content_sha256"]


def test_an_adapter_is_compared_by_weights_and_settings(tmp_path):
    described = []
    for name, weights in (("a", "same"), ("b", "same"), ("c", "other")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "adapter_model.safetensors").write_text(weights)
        (folder / "adapter_record.json").write_text(json.dumps({"run": name}))
        (folder / "adapter_config.json").write_text(json.dumps({"r": 4, "base_model_name_or_path": f"/{name}"}))
        described.append(describe_artifact("adapter", folder, tmp_path, name)["content_sha256"])
    assert described[0] == described[1] != described[2]


def test_a_changed_or_lost_file_is_named(tmp_path):
    (tmp_path / "samples.json").write_text("[]")
    artifact = describe_artifact("samples", tmp_path / "samples.json", tmp_path, None)
    assert artifact["path"] == "samples.json"
    assert fault_of(artifact, tmp_path) is None
    (tmp_path / "samples.json").write_text("[1]")
    assert fault_of(artifact, tmp_path) == "samples.json has different bytes"
    (tmp_path / "samples.json").unlink()
    assert fault_of(artifact, tmp_path) == "samples.json is missing"


def test_a_changed_file_of_a_folder_is_named(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "weights").write_text("w")
    artifact = describe_artifact("tiny_base", folder, tmp_path, None)
    (folder / "weights").write_text("v")
    assert fault_of(artifact, tmp_path) == "model/weights has different bytes"


def test_a_manifest_vouches_for_its_pictures(tmp_path):
    import hashlib

    (tmp_path / "a.png").write_bytes(b"picture")
    sha256 = hashlib.sha256(b"picture").hexdigest()
    (tmp_path / "manifest.csv").write_text(f"id,sha256,path\nidentity_1,{sha256},a.png\n")
    artifact = describe_artifact("images", tmp_path / "manifest.csv", tmp_path, None)
    assert fault_of(artifact, tmp_path) is None
    (tmp_path / "a.png").write_bytes(b"Picture")
    assert fault_of(artifact, tmp_path) == "picture 'identity_1': a.png has different bytes"


def test_the_first_line_that_differs_is_shown(tmp_path):
    (tmp_path / "a").write_text("same\na red circle\nmore\n")
    (tmp_path / "b").write_text("same\na blue circle\nmore\n")
    assert first_difference(tmp_path / "a", tmp_path / "b") == "line 2: a red circle → a blue circle"
    assert first_difference(tmp_path / "a", tmp_path / "gone") is None


def test_of_long_lines_the_place_that_differs_is_shown(tmp_path):
    for name, caption in (("a", "a red circle"), ("b", "a blue circle")):
        (tmp_path / name).write_text(f"{'x' * 300} {caption} {'y' * 300}")
    said = first_difference(tmp_path / "a", tmp_path / "b")
    assert "a red circle" in said
    assert "a blue circle" in said
    assert len(said) < 300
