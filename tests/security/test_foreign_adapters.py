"""A stranger's adapter is numbers and settings: it runs nothing, reads nothing outside, and asks no network.

To see a test fail, take its condition out of `Adapter.check_files`. With all of it away, peft 0.21.2 and torch 2.15,
the module of megatron_config ran, and the linked weights and the X-LoRA adapter were loaded. The pickle did not run,
because `weights_only` stops it too: the check is a second wall. Two tests have no defence of ours to take away, because
PEFT does no such thing: what a config calls its base, and auto_mapping. They watch that this stays so.
"""

from __future__ import annotations

import json
import shutil

import pytest

from qwen_vl_lora.exceptions import AdapterError
from qwen_vl_lora.model.adapter import RECORD_FILE, Adapter
from qwen_vl_lora.model.base_model import BaseModel
from security.watching import watched
from tiny_adapters import save_adapter


@pytest.fixture(scope="module")
def good(base_path, tmp_path_factory):
    """An adapter as this project writes it."""
    folder = tmp_path_factory.mktemp("adapter")
    save_adapter(folder, BaseModel("tiny", base_path("qwen2_vl")))
    return folder


@pytest.fixture
def foreign(good, tmp_path):
    """`foreign(peft_type=…)`: the adapter with another configuration."""
    folder = shutil.copytree(good, tmp_path / "adapter")

    def make(**config):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
        return Adapter(folder)

    return make


@pytest.fixture
def base(base_path):
    return BaseModel("tiny", base_path("qwen2_vl")).load_model("float32", "cpu")


def test_the_adapter_itself_loads(foreign, base):
    assert any("lora_A" in name for name, _ in foreign().attach(base).named_parameters())


@pytest.mark.parametrize("name", ["attacker/model", "https://attacker.example/model", "OUTSIDE"])
def test_what_a_config_calls_its_base_is_not_looked_for(foreign, base, tmp_path, malicious_pickle, trace, name):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "config.json").write_text(json.dumps({"auto_map": {"AutoModel": "evil.Model"}, "model_type": "evil"}))
    malicious_pickle(outside / "pytorch_model.bin")
    adapter = foreign(base_model_name_or_path=str(outside) if name == "OUTSIDE" else name, revision="evil")
    with watched() as events:
        adapter.attach(base)
    assert not [event for event in events if event.startswith(("socket", "subprocess", "os."))]
    assert not [event for event in events if str(outside) in event or "attacker" in event]
    assert not trace.exists()


def test_auto_mapping_imports_nothing(foreign, base, malicious_module, trace):
    malicious_module("evil_library")
    foreign(auto_mapping={"base_model_class": "Model", "parent_library": "evil_library"}).attach(base)
    assert not trace.exists()


def test_a_module_that_the_config_names_is_not_imported(foreign, base, malicious_module, trace):
    malicious_module("megatron.evil")
    adapter = foreign(megatron_config={"hidden_size": 1}, megatron_core="megatron.evil")
    with pytest.raises(AdapterError, match="names a module for PEFT to import"):
        adapter.attach(base)
    assert not trace.exists()


@pytest.mark.parametrize("kind", ["XLORA", "PROMPT_TUNING", "ADAPTION_PROMPT", None])
def test_other_kinds_of_adapters_are_refused(foreign, base, kind):
    with pytest.raises(AdapterError, match="peft_type .*; expected LORA"):
        foreign(peft_type=kind).attach(base)


def test_weights_in_a_pickle_are_refused_and_not_opened(foreign, base, malicious_pickle, trace):
    adapter = foreign()
    (adapter.path / "adapter_model.safetensors").unlink()
    malicious_pickle(adapter.path / "adapter_model.bin")
    with pytest.raises(AdapterError, match="lacks adapter_model.safetensors. Adapters stored as pickles are refused"):
        adapter.attach(base)
    assert not trace.exists()


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", RECORD_FILE])
def test_a_link_that_leads_outside_is_refused(foreign, base, tmp_path, name):
    adapter = foreign()
    target = tmp_path / "elsewhere"
    (adapter.path / name).rename(target)
    (adapter.path / name).symlink_to(target)
    with pytest.raises(AdapterError, match=f"{name} leads outside, to .*elsewhere"):
        adapter.attach(base)


def test_a_link_to_the_whole_folder_is_fine(foreign, base, tmp_path):
    (tmp_path / "link").symlink_to(foreign().path)
    Adapter(tmp_path / "link").attach(base)


@pytest.mark.parametrize("text", ["{", "[]", "7"])
def test_a_config_that_is_no_json_object_is_refused(foreign, base, text):
    adapter = foreign()
    (adapter.path / "adapter_config.json").write_text(text)
    with pytest.raises(AdapterError, match=r"adapter_config\.json"):
        adapter.attach(base)


def test_unknown_keys_are_refused(foreign, base):
    with pytest.raises(AdapterError, match=r"run_this is .*adapter_config.json, and 'None' by adapter_record.json"):
        foreign(run_this="os.system('x')").attach(base)
