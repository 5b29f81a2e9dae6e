"""`qwen-vl-lora features` shows what is stored of pictures, and removes what it is told to."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from qwen_vl_lora.cli import cli
from qwen_vl_lora.exceptions import MissingArtifactError
from qwen_vl_lora.features.encoding import encode_pictures
from qwen_vl_lora.features.key import FeatureKey
from qwen_vl_lora.features.store import FeatureStore
from qwen_vl_lora.model.base_model import BaseModel
from qwen_vl_lora.runs.records import runs_folder
from qwen_vl_lora.runs.storage import Lock

PROJECT = Path(__file__).parents[2]


def features(*arguments):
    return CliRunner().invoke(cli, ["features", *arguments], catch_exceptions=False).output


def write_record(project, outcome):
    folder = runs_folder(project, "own") / "r1"
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"format": 1, "id": "r1", "sequence": 0, "recipe": "own", "outcome": outcome, "stages": {}}
    (folder / "record.json").write_text(json.dumps({**facts, "datasets": {"read": {}, "written": {}}}))
    return folder


@pytest.fixture
def keys(tmp_path, monkeypatch, images, image_parameters, base_path):
    """Two keys of really encoded pictures: float32 and bfloat16."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(PROJECT / "conf", tmp_path / "conf")
    write_record(tmp_path, "finished")
    base = BaseModel("tiny", base_path("qwen2_vl"))
    store = FeatureStore(tmp_path / "data/04_feature/own/image_features")
    for dtype in ("float32", "bfloat16"):
        store.publish(
            encode_pictures(images, base, image_parameters, dtype, torch.device("cpu"), store, tmp_path / "staging")
        )
    return [FeatureKey.of(base, image_parameters.size, dtype).digest for dtype in ("float32", "bfloat16")]


def test_it_shows_pictures_size_and_what_a_key_stands_for(keys):
    lines = features("show").splitlines()
    assert len(lines) == 2
    (line,) = [line for line in lines if f"own/{keys[0]}" in line]
    assert "4 pictures, 0.0 MiB" in line
    assert "float32, tower " in line
    assert "transformers==" in line


def test_it_removes_the_named_key_alone_and_only_when_told(keys, tmp_path):
    folder = tmp_path / "data/04_feature/own/image_features"
    assert f"would remove data/04_feature/own/image_features/{keys[0]}" in features("prune", keys[0])
    assert (folder / keys[0]).exists()
    assert f"removed data/04_feature/own/image_features/{keys[0]}" in features("prune", keys[0], "--yes")
    assert [path.name for path in folder.iterdir()] == [keys[1]]


def test_a_key_that_is_not_there_is_named_with_those_that_are(keys):
    with pytest.raises(MissingArtifactError, match=f"under the key 'abc'. Stored keys: .*{keys[0]}"):
        features("prune", keys[0], "abc", "--yes")
    assert len(features("show").splitlines()) == 2


def test_nothing_goes_while_a_run_is_under_way(keys, tmp_path):
    lock = Lock(write_record(tmp_path, "running") / ".lock")
    assert lock.acquire()
    assert "is kept: run r1 of own is still running" in features("prune", "--yes")
    assert len(features("show").splitlines()) == 2
    lock.release()
    features("prune", "--yes")
    assert features("show") == ""


def test_names_of_stored_features_and_surroundings_are_read_without_torch(tmp_path):
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "import numpy\n"
        "from safetensors.numpy import save_file\n"
        "from qwen_vl_lora.commands import features, verify\n"
        "from qwen_vl_lora.features.store import ImageFeatures\n"
        "save_file({'a': numpy.zeros(2), 'b': numpy.zeros(2)}, 'shard.safetensors')\n"
        "assert len(ImageFeatures(Path())) == 2\n"
        "assert verify.describe_surroundings(Path(), 'auto')['packages']['torch']\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, timeout=60)
