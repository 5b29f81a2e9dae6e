"""A base model is what its bytes are, and an unusable one is refused by name."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen_vl_lora.exceptions import BaseModelError, MissingArtifactError
from qwen_vl_lora.model.base_model import BaseModel
from tiny_models import FAMILIES


@pytest.fixture
def copied(base_path, tmp_path):
    """A private copy of a tiny base that a test may damage."""

    def make(family="qwen2_vl"):
        return shutil.copytree(base_path(family), tmp_path / family)

    return make


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def flip_a_byte(folder, part):
    """Change one bit of the last weight whose name contains `part`."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    name = [name for name in weights if part in name][-1]
    flat = weights[name].view(torch.uint8).flatten()
    flat[0] ^= 1
    save_file(weights, path, metadata={"format": "pt"})


def fingerprints(folder):
    base = BaseModel("tiny", folder)
    return base.fingerprint, base.vision_fingerprint


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_files_elsewhere_have_the_same_fingerprints(base_path, copied, family):
    assert fingerprints(copied(family)) == fingerprints(base_path(family))


@pytest.mark.parametrize("family", FAMILIES)
def test_one_bit_of_the_tower_changes_both_fingerprints(base_path, copied, family):
    folder = copied(family)
    flip_a_byte(folder, "visual.")
    whole, vision = fingerprints(base_path(family))
    assert fingerprints(folder)[0] != whole
    assert fingerprints(folder)[1] != vision


def test_one_bit_of_the_language_model_leaves_the_tower_what_it_is(base_path, copied):
    folder = copied()
    flip_a_byte(folder, "layers.1.mlp")
    whole, vision = fingerprints(base_path("qwen2_vl"))
    assert fingerprints(folder)[0] != whole
    assert fingerprints(folder)[1] == vision


def test_the_preprocessor_is_part_of_the_tower(base_path, copied):
    folder = copied()
    path = folder / "processor_config.json"
    path.write_text(path.read_text() + "\n")
    assert fingerprints(folder)[1] != fingerprints(base_path("qwen2_vl"))[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tower_alone_gives_the_features_of_the_whole_model(base_path, family):
    base = BaseModel("tiny", base_path(family))
    grid = torch.tensor([[1, 8, 8], [1, 4, 6]])
    values = 3 * 2 * base.family.patch_size**2
    pixels = torch.randn(int(grid.prod(-1).sum()), values, generator=torch.Generator().manual_seed(0))
    whole = base.load_model("float32", "cpu").model.visual
    tower = base.load_vision_tower("float32", "cpu")
    assert torch.equal(tower(pixels, grid_thw=grid).pooler_output, whole(pixels, grid_thw=grid).pooler_output)


def test_a_missing_directory_is_named_with_what_to_do(tmp_path):
    with pytest.raises(MissingArtifactError, match="nowhere not found.*kedro run --pipeline base_model"):
        BaseModel("tiny", tmp_path / "nowhere").check()


def test_remote_code_is_refused(copied):
    folder = copied()
    edit_config(folder, auto_map={"AutoModel": "theirs.Model"})
    with pytest.raises(BaseModelError, match="asks for its own code"):
        BaseModel("tiny", folder).check()


def test_another_family_is_refused(copied):
    folder = copied()
    edit_config(folder, model_type="llava")
    with pytest.raises(BaseModelError, match="family 'llava'; supported: qwen2_vl, qwen2_5_vl, qwen3_vl, qwen3_5"):
        BaseModel("tiny", folder).check()


def test_pickles_are_refused(copied):
    folder = copied()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(BaseModelError, match="only pickle files"):
        BaseModel("tiny", folder).check()


def test_a_truncated_weight_file_is_refused(copied):
    path = copied() / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(BaseModelError, match="ends at byte"):
        _ = BaseModel("tiny", path.parent).vision_fingerprint


def test_an_image_token_that_the_model_does_not_know_is_refused(copied):
    folder = copied()
    edit_config(folder, image_token_id=3)
    with pytest.raises(BaseModelError, match="image_token_id 3"):
        BaseModel("tiny", folder).load_processor()


@pytest.mark.parametrize("family", FAMILIES)
def test_another_attention_is_that_of_the_language_model_alone(base_path, family):
    """`eager` stands in for flash-attention, which takes a GPU."""
    model = BaseModel("tiny", base_path(family)).load_model("float32", "cpu", attention="eager").model
    assert model.language_model.layers[1].self_attn.config._attn_implementation == "eager"
    assert model.visual.config._attn_implementation == "sdpa"
