"""A merged model is what base + adapter is, on both families, with tied and untied embeddings, or it is refused."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForImageTextToText

from qwen_vl_lora.exceptions import AdapterError
from qwen_vl_lora.model import merging
from qwen_vl_lora.model.adapter import Adapter
from qwen_vl_lora.model.base_model import BaseModel
from qwen_vl_lora.model.fingerprints import stored_tensors
from qwen_vl_lora.model.lora import add_adapter
from qwen_vl_lora.model.merging import distance, merge_adapter, merged_if_exact
from qwen_vl_lora.parameters import ExportParameters, LoraParameters
from tiny_adapters import adapter_record, write_record
from tiny_models import FAMILIES

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
AS_STORED = ExportParameters(dtype="base", max_shard_size="5GB")
CPU = torch.device("cpu")


def lora(**changes):
    settings = {"r": 4, "lora_alpha": 16, "lora_dropout": 0.0, "bias": "none", "target_modules": PROJECTIONS}
    return LoraParameters(**{**settings, "use_rslora": False, "use_dora": False, **changes})


@pytest.fixture
def make_adapter(tmp_path):
    """`make_adapter(base)`: an adapter that changes its base by as much as `strength`."""

    def make(base, strength=0.1, **changes):
        model = add_adapter(base.load_model("float32", "cpu"), lora(**changes), "frozen", seed=0)
        torch.manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name or "lora_embedding_B" in name:
                    parameter.normal_(std=strength)
        folder = tmp_path / "adapter"
        model.save_pretrained(folder)
        write_record(folder, adapter_record(base, lora=lora(**changes).model_dump()))
        return Adapter(folder)

    return make


def logits(model):
    with torch.inference_mode():
        return model(input_ids=torch.arange(48).reshape(2, 24)).logits.float()


def tensors(folder):
    return {tensor.name: tensor for path in BaseModel("m", folder).weight_files for tensor in stored_tensors(path)}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_plain_transformers_reads_the_logits_of_base_and_adapter(base_path, make_adapter, tmp_path, family, tied):
    base = BaseModel("base", base_path(family, tied=tied))
    adapter = make_adapter(base)
    check = merge_adapter(base, adapter, tmp_path / "merged", AS_STORED, CPU, logits)
    alone = logits(AutoModelForImageTextToText.from_pretrained(base.path))
    tuned = logits(adapter.attach(AutoModelForImageTextToText.from_pretrained(base.path)))
    merged = logits(AutoModelForImageTextToText.from_pretrained(tmp_path / "merged"))
    assert distance(merged, tuned) == pytest.approx(check.error, abs=1e-6)
    assert distance(merged, tuned) < 1e-5
    assert distance(alone, tuned) == pytest.approx(check.effect, rel=1e-4)
    assert check.effect > 0.01


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_names_shapes_and_config_are_the_bases_own(base_path, make_adapter, tmp_path, family, tied):
    base = BaseModel("base", base_path(family, tied=tied))
    merge_adapter(base, make_adapter(base), tmp_path / "merged", AS_STORED, CPU, logits)
    ours, theirs = (
        {name: one.shape for name, one in tensors(folder).items()} for folder in (tmp_path / "merged", base.path)
    )
    assert ours == theirs
    assert BaseModel("m", tmp_path / "merged").config == base.config
    assert (tmp_path / "merged" / "tokenizer.json").read_bytes() == (base.path / "tokenizer.json").read_bytes()


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`", "ignore:Setting `save_embedding_layers`")
def test_an_adapted_output_layer_is_untied_so_that_the_input_embeddings_stay(base_path, make_adapter, tmp_path):
    base = BaseModel("base", base_path("qwen2_vl"))
    check = merge_adapter(
        base, make_adapter(base, target_modules=["q_proj", "lm_head"]), tmp_path / "merged", AS_STORED, CPU, logits
    )
    assert check.error < 1e-5
    assert BaseModel("m", tmp_path / "merged").config["tie_word_embeddings"] is False
    (file,), (theirs,) = BaseModel("m", tmp_path / "merged").weight_files, base.weight_files
    (name,) = (name for name in tensors(base.path) if "embed_tokens" in name)
    assert torch.equal(safe_open(file, "pt").get_tensor(name), safe_open(theirs, "pt").get_tensor(name))


@pytest.mark.parametrize("changes", [{"use_dora": True}, {"use_rslora": True}, {"bias": "lora_only"}])
def test_the_other_kinds_of_lora_merge_too(base_path, make_adapter, tmp_path, changes):
    base = BaseModel("base", base_path("qwen2_vl"))
    assert merge_adapter(base, make_adapter(base, **changes), tmp_path / "merged", AS_STORED, CPU, logits).error < 1e-5


def test_a_merge_that_lost_the_adapter_is_refused(base_path, make_adapter, tmp_path, monkeypatch):
    base = BaseModel("base", base_path("qwen2_vl"))
    adapter = make_adapter(base)
    monkeypatch.setattr(PeftModel, "merge_and_unload", lambda self, **_: self.unload(), raising=False)
    with pytest.raises(AdapterError, match=r"differ from those of base \+ adapter by .* Nothing was published"):
        merge_adapter(base, adapter, tmp_path / "merged", AS_STORED, CPU, logits)


def test_an_adapter_that_changes_nothing_is_refused(base_path, make_adapter, tmp_path):
    base = BaseModel("base", base_path("qwen2_vl"))
    with pytest.raises(AdapterError, match="changes no logit of its base"):
        merge_adapter(base, make_adapter(base, strength=0.0), tmp_path / "merged", AS_STORED, CPU, logits)


def test_an_effect_that_rounding_swallows_is_refused_in_half_precision_only(base_path, make_adapter, tmp_path):
    base = BaseModel("base", base_path("qwen2_vl"))
    weak = make_adapter(base, strength=1e-5)
    merge_adapter(base, weak, tmp_path / "merged", AS_STORED, CPU, logits)
    half = AS_STORED.model_copy(update={"dtype": "bfloat16"})
    with pytest.raises(AdapterError, match=r"merged in bfloat16: .* Set export.dtype: float32"):
        merge_adapter(base, weak, tmp_path / "merged", half, CPU, logits)


def test_precision_and_shards_are_as_asked(base_path, make_adapter, tmp_path):
    base = BaseModel("base", base_path("qwen2_vl"))
    export = ExportParameters(dtype="bfloat16", max_shard_size="100KB")
    check = merge_adapter(base, make_adapter(base), tmp_path / "merged", export, CPU, logits)
    assert check.dtype == "bfloat16"
    assert {tensor.dtype for tensor in tensors(tmp_path / "merged").values()} == {"BF16"}
    assert len(BaseModel("m", tmp_path / "merged").weight_files) > 1
    assert AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").dtype == torch.bfloat16


def test_plain_generation_is_greedy_whatever_the_base_says(base_path, make_adapter, tmp_path):
    base = BaseModel("base", base_path("qwen2_vl"))
    merge_adapter(base, make_adapter(base), tmp_path / "merged", AS_STORED, CPU, logits)
    config = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").generation_config
    assert (config.do_sample, config.max_new_tokens) == (False, 7)
    assert config.eos_token_id == json.loads((base.path / "generation_config.json").read_text())["eos_token_id"]
    assert merging.stored_dtype(base) == "float32"


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`", "ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("changes", [{}, {"use_dora": True}, {"target_modules": ["lm_head", "q_proj"]}])
def test_captions_are_written_by_merged_float32_weights_and_by_half_precision_as_it_is(
    base_path, make_adapter, changes
):
    base = BaseModel("base", base_path("qwen2_vl", tied=True))
    adapter = make_adapter(base, **changes)
    tuned = logits(adapter.attach(base.load_model("float32", CPU)))
    merged = merged_if_exact(adapter.attach(base.load_model("float32", CPU)))
    assert not isinstance(merged, PeftModel)
    torch.testing.assert_close(logits(merged), tuned, rtol=1e-4, atol=1e-4)
    assert isinstance(merged_if_exact(adapter.attach(base.load_model("bfloat16", CPU))), PeftModel)
