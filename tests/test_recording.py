"""What a run record says of a dataset: its own word, or that of a stock Kedro dataset; and what a run takes."""

import json

from kedro.io import MemoryDataset, Version
from kedro_datasets.json import JSONDataset
from kedro_datasets.text import TextDataset

from qwen_vl_lora.datasets.artifacts import ArtifactDataset
from qwen_vl_lora.datasets.image_features import ImageFeaturesDataset
from qwen_vl_lora.datasets.sources import ScenesDataset
from qwen_vl_lora.datasets.workspace import WorkspaceDataset
from qwen_vl_lora.features.store import StagedShards
from qwen_vl_lora.runs.artifacts import digest
from qwen_vl_lora.runs.storage import file_sha256
from qwen_vl_lora.session.recording import chosen_inputs, described_artifact


def test_a_stock_dataset_is_recorded_with_its_file_and_version(tmp_path):
    plain = JSONDataset(filepath=str(tmp_path / "numbers.json"))
    plain.save([1])
    assert described_artifact("numbers", plain, [1], tmp_path) == {
        "version": None,
        "path": "numbers.json",
        "sha256": file_sha256(tmp_path / "numbers.json"),
    }
    versioned = TextDataset(filepath=str(tmp_path / "text.txt"), version=Version(None, "v1"))
    versioned.save("text")
    described = described_artifact("text", versioned, "text", tmp_path)
    assert described == {
        "version": "v1",
        "path": "text.txt/v1/text.txt",
        "sha256": file_sha256(tmp_path / "text.txt/v1/text.txt"),
    }


def test_a_source_is_recorded_by_what_it_says_of_itself(tmp_path):
    said = {"num_images": 3, "seed": 7}
    described = described_artifact("captioned_images", ScenesDataset(**said), None, tmp_path)
    assert described == {
        "version": None,
        "type": "ScenesDataset",
        "describe": said,
        "sha256": None,
        "content_sha256": digest(said),
    }


def test_an_own_dataset_gives_its_version_and_the_features_their_keys(tmp_path):
    artifact = ArtifactDataset(str(tmp_path / "n.json"), {"type": "json.JSONDataset"}, Version(None, "v1"))
    artifact.save([1])
    assert described_artifact("n", artifact, [1], tmp_path)["path"] == "n.json/v1/n.json"
    for key in ("k1", "k2"):
        (tmp_path / "store" / key).mkdir(parents=True)
        (tmp_path / "store" / key / "abc.safetensors").touch()
    features = ImageFeaturesDataset(filepath=str(tmp_path / "store"))
    assert described_artifact("image_features", features, features.load(), tmp_path) == {
        "version": None,
        "path": "store",
        "keys": ["k1", "k2"],
        "sha256": digest({"k1/abc.safetensors": "abc", "k2/abc.safetensors": "abc"}),
        "content_sha256": None,
        "files": {"k1/abc.safetensors": "abc", "k2/abc.safetensors": "abc"},
    }
    assert described_artifact("image_features", features, StagedShards(None, ()), tmp_path)["keys"] == []


def test_what_lies_in_memory_alone_is_not_recorded_nor_is_the_workspace(tmp_path):
    for dataset in (None, MemoryDataset(1), WorkspaceDataset(filepath=str(tmp_path))):
        assert described_artifact("x", dataset, 1, tmp_path) is None


def test_an_adapter_that_is_not_the_newest_is_not_called_so(tmp_path):
    for number, run_id in enumerate(("r1", "r2"), start=1):
        folder = tmp_path / "data/08_reporting/tiny/runs" / run_id
        folder.mkdir(parents=True)
        adapter = {"version": run_id, "path": f"adapter/{run_id}"}
        (tmp_path / adapter["path"]).mkdir(parents=True)
        facts = {"format": 1, "id": run_id, "sequence": number, "order": number, "recipe": "tiny"}
        written = {"read": {}, "written": {"adapter": adapter}}
        text = {**facts, "outcome": "finished", "stages": {"training": ["adapter"]}, "datasets": written}
        (folder / "record.json").write_text(json.dumps(text))
    (newest,) = chosen_inputs(tmp_path, "tiny", {"adapter": "r2"}, {})
    assert newest == "Adapter: r2 of recipe tiny, never evaluated (the newest of recipe tiny)."
    (older,) = chosen_inputs(tmp_path, "tiny", {"adapter": "r1"}, {})
    assert "(the newest of recipe tiny that belongs with the other inputs)." in older
