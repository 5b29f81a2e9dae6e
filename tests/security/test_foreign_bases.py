"""A stranger's base model brings weights and settings, never code, pickles or files from elsewhere.

To see a test fail, take its condition out of `BaseModel.check` or `weight_files`. The pickle behind a decoy does not
run without `use_safetensors` either, because torch 2.15 refuses it: argument and check are walls before torch's own.
"""

from __future__ import annotations

import json
import shutil

import pytest

from model.damage import edit_json
from qwen_vl_lora.exceptions import BaseModelError
from qwen_vl_lora.model.base_model import BaseModel


@pytest.fixture
def foreign(base_path, tmp_path):
    """A private copy of a tiny base."""
    return BaseModel("foreign", shutil.copytree(base_path("qwen2_vl"), tmp_path / "base"))


def test_a_pickle_behind_a_decoy_is_not_loaded(foreign, malicious_pickle, trace):
    """With another *.safetensors in the folder, transformers alone would take pytorch_model.bin."""
    (foreign.path / "model.safetensors").rename(foreign.path / "decoy.safetensors")
    malicious_pickle(foreign.path / "pytorch_model.bin")
    with pytest.raises(BaseModelError, match=r"decoy\.safetensors"):
        foreign.check()
    with pytest.raises(BaseModelError, match=r"decoy\.safetensors"):
        foreign.load_model("float32", "cpu")
    assert not trace.exists()


@pytest.mark.parametrize(
    "file", ["config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json"]
)
def test_code_of_its_own_is_refused_in_every_file(foreign, trace, file):
    (foreign.path / "evil.py").write_text(f"import pathlib\npathlib.Path({str(trace)!r}).mkdir()\n")
    edit_json(foreign.path / file, auto_map={"AutoProcessor": "evil.Processor", "AutoTokenizer": ["evil.T", None]})
    with pytest.raises(BaseModelError, match=f"asks for its own code .auto_map in {file}"):
        foreign.check()
    assert not trace.exists()


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize("where", [None, "text_config", "vision_config"])
def test_kernels_from_a_hub_are_refused(foreign, key, where):
    config = json.loads((foreign.path / "config.json").read_text())
    (config if where is None else config[where])[key] = "attacker/attention"
    (foreign.path / "config.json").write_text(json.dumps(config))
    with pytest.raises(BaseModelError, match=f"asks for its own code .{key} in config.json"):
        foreign.check()


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/passwd", "sub/model.safetensors", "pytorch_model.bin", ".."]
)
def test_an_index_names_only_safetensors_beside_it(foreign, name):
    (foreign.path / "model.safetensors").unlink()
    edit_json(foreign.path / "model.safetensors.index.json", metadata={}, weight_map={"a": name})
    with pytest.raises(BaseModelError, match="expected the name of a safetensors file beside it"):
        foreign.check()


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": []}', "{}"])
def test_an_index_that_is_none_is_refused(foreign, text):
    (foreign.path / "model.safetensors").unlink()
    (foreign.path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(BaseModelError, match=r"model\.safetensors\.index\.json"):
        foreign.check()
