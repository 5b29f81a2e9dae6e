"""An adapter is what its record says: odd records, other tensors and damaged files are refused in words.

On commit 981ed87 odd records, patterns that are none and damaged files ended in tracebacks, a changed lora_alpha or
tensors that find no place changed results without a word, and a FIFO was waited for.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from model.damage import DAMAGED_FILES, VALUES, damage_file, damage_json, damage_tensor, edit_json, edit_weights
from qwen_vl_lora.exceptions import AdapterError, QwenVLLoraError
from qwen_vl_lora.model.adapter import RECORD_FILE, WEIGHTS_FILE, Adapter
from qwen_vl_lora.model.adapter_record import AdapterRecord, faults_of_record
from qwen_vl_lora.model.base_model import BaseModel
from qwen_vl_lora.model.lora import add_adapter
from qwen_vl_lora.model.parent import ParentAdapter, find_parent
from qwen_vl_lora.parameters import GenerationParameters, ImageParameters, LoraParameters, PromptParameters
from samples.pictures import workspace_folder
from tiny_adapters import LORA, adapter_record, save_adapter, write_record

CONFIG = "adapter_config.json"
B = "base_model.model.model.language_model.layers.1.self_attn.q_proj.lora_B.weight"


@pytest.fixture(scope="module")
def base(base_path):
    return BaseModel("tiny", base_path("qwen2_vl"))


@pytest.fixture(scope="module")
def sound(base, tmp_path_factory):
    """An adapter that changes its base."""
    adapter = save_adapter(tmp_path_factory.mktemp("adapter"), base)
    weights = load_file(adapter.path / WEIGHTS_FILE)
    generator = torch.Generator().manual_seed(0)
    changed = {name: torch.randn(value.shape, generator=generator) / 4 for name, value in weights.items()}
    save_file(changed, adapter.path / WEIGHTS_FILE)
    return adapter.path


@pytest.fixture
def folder(sound, tmp_path):
    return shutil.copytree(sound, tmp_path / "adapter")


def use(folder, base):
    """What captioning does with an adapter: the look before the run, the base compared, the weights put on."""
    adapter = Adapter(folder)
    adapter.check_files()
    adapter.check_base(base)
    model = adapter.attach(base.load_model("float32", "cpu"))
    with torch.inference_mode():
        return adapter, model(input_ids=torch.arange(30).reshape(2, 15)).logits


def test_a_record_of_commit_981ed87_is_accepted_whole(base):
    record = adapter_record(base, run={"id": "r", "recipe": "tiny", "read": {"images": {"version": None, "path": "p"}}})
    assert faults_of_record(record) == []
    assert faults_of_record({**record, "parent": {"path": "p", "sha256": "0" * 64, "run": None}}) == []
    assert record.keys() == AdapterRecord.model_fields.keys()


def test_the_blocks_that_are_asked_with_are_those_of_the_parameters():
    record = adapter_record()
    assert record["image"].items() <= ImageParameters.model_validate(record["image"]).model_dump().items()
    assert GenerationParameters.model_validate(record["generation"]).model_dump() == record["generation"]
    assert PromptParameters.model_validate(record["prompt"]).model_dump() == record["prompt"]


@pytest.mark.parametrize("name", sorted(set(adapter_record()) - {"attention", "quantization", "parent"}))
def test_a_record_without_one_of_its_parts_names_it(folder, name):
    record = json.loads((folder / RECORD_FILE).read_text())
    del record[name]
    write_record(folder, record)
    with pytest.raises(AdapterError, match=f"{RECORD_FILE} is not a record of an adapter: {name}: Field required"):
        _ = Adapter(folder).record


WRONG = {
    "base_model": [None, "x", {}, {"name": "x", "fingerprint": "y"}, {"name": 1, "fingerprint": "0" * 64}],
    "prompt": [
        None,
        {},
        {"user": 1, "system": None, "override": False},
        {"user": "", "system": None, "override": True},
    ],
    "image": [None, {}, {**adapter_record()["image"], "min_pixels": "3136"}],
    "generation": [None, {"max_new_tokens": 0, "repetition_penalty": 1.0, "batch_size": 1}],
    "lora": [None, {}, {**LORA.model_dump(), "r": "2"}, {**LORA.model_dump(), "lora_dropout": 2.0}],
    "training_args": [None, {}, {"bf16": "yes", "fp16": False}],
    "training": [None, {}, []],
    "data": [None, {}, {"train_conversations": {"samples": 1}}],
    "run": [None, {}, {"id": None}, {"id": "x", "read": []}, {"id": "x", "read": {"images": None}}],
    "parent": [{}, "x", {"path": 1, "sha256": "0" * 64, "run": None}],
    "vision": [None, "thawed", True],
    "max_length": [None, "128", 1.5, True, 0],
    "quantization": ["int2", 4],
    "of_the_future": [None, 1, {}],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_a_part_of_a_record_of_another_type_is_refused_by_its_place(folder, name, value):
    edit_json(folder / RECORD_FILE, **{name: value})
    with pytest.raises(AdapterError, match=f"{RECORD_FILE} is not a record of an adapter: .*{name}"):
        Adapter(folder).check_files()


@pytest.mark.parametrize(
    "change",
    [
        {"lora_alpha": 400},
        {"r": 3},
        {"use_rslora": True},
        {"use_dora": True},
        {"target_modules": ["v_proj"]},
        {"target_modules": "("},
        {"exclude_modules": None},
        {"layers_to_transform": [0]},
        {"rank_pattern": {"q_proj": 1}},
        {"alpha_pattern": {"q_proj": 64}},
        {"modules_to_save": ["lm_head"]},
        {"init_lora_weights": "pissa"},
        {"layer_replication": [[0, 2]]},
        {"arrow_config": {"top_k": 1}},
        {"task_type": "SEQ_CLS"},
        {"bias": "all"},
        {"a_key_of_nobody": 1},
    ],
)
def test_a_configuration_that_differs_from_the_record_is_refused_by_its_key(folder, change):
    edit_json(folder / CONFIG, **change)
    with pytest.raises(AdapterError, match=f"{next(iter(change))} is .* in {CONFIG}, and .* by {RECORD_FILE}"):
        Adapter(folder).check_files()


@pytest.mark.parametrize("change", [{"target_modules": "("}, {"rank_pattern": {"(": 2}}, {"alpha_pattern": {"*": 2}}])
def test_a_pattern_that_is_none_is_refused_in_words(folder, change):
    record = json.loads((folder / RECORD_FILE).read_text())
    edit_json(folder / RECORD_FILE, lora={**record["lora"], **change})
    edit_json(folder / CONFIG, **change)
    with pytest.raises(AdapterError, match="is not a pattern of module names"):
        Adapter(folder).check_files()


@pytest.mark.parametrize("value", ["a/b/.c", None, "https://x.example", 3])
def test_what_a_configuration_calls_its_base_is_neither_compared_nor_asked_for(folder, base, value):
    edit_json(folder / CONFIG, base_model_name_or_path=value, revision=value, peft_version="9")
    Adapter(folder).check_base(base)


DAMAGED_WEIGHTS = {
    "a missing tensor": (lambda w: w.pop(B), f"{B}: expected .64, 2., got nothing"),
    "a surplus tensor": (lambda w: w.update(extra=torch.zeros(3)), "extra: expected nothing, got .3,."),
    "a tensor of the base": (
        lambda w: w.update({"base_model.model.model.language_model.norm.weight": torch.ones(64)}),
        "norm.weight: expected nothing",
    ),
    "another shape": (lambda w: w.update({B: w[B][:, :1].contiguous()}), f"{B}: expected .64, 2., got .64, 1."),
    "whole numbers": (lambda w: w.update({B: w[B].to(torch.int8)}), f"tensor {B} has the type I8"),
    "NaN": (lambda w: w.update({B: w[B] * float("nan")}), f"tensor {B} has values that are NaN or infinite"),
    "infinity": (lambda w: w.update({B: w[B] + float("inf")}), f"tensor {B} has values that are NaN or infinite"),
    "nothing": (lambda w: w.clear(), "4 tensors differ"),
}


@pytest.mark.parametrize("damage", DAMAGED_WEIGHTS)
def test_weights_that_are_not_those_of_the_configuration_are_refused_before_any_caption(folder, base, damage):
    change, message = DAMAGED_WEIGHTS[damage]
    edit_weights(folder / WEIGHTS_FILE, change)
    with pytest.raises(AdapterError, match=message):
        Adapter(folder).check_base(base)
    with pytest.raises(AdapterError):
        Adapter(folder).attach(base.load_model("float32", "cpu"))
    with pytest.raises(AdapterError):
        ParentAdapter("here", Adapter(folder)).load_into(
            add_adapter(base.load_model("float32", "cpu"), LORA, "frozen", seed=0)
        )


@pytest.mark.parametrize("damage", DAMAGED_FILES)
@pytest.mark.parametrize("name", [CONFIG, RECORD_FILE, WEIGHTS_FILE])
def test_a_damaged_file_is_one_message_that_names_it(folder, name, damage):
    DAMAGED_FILES[damage](folder / name)
    with pytest.raises(QwenVLLoraError, match=name.replace(".", r"\.")) as refused:
        Adapter(folder).check_files()
    assert len(str(refused.value)) < 1000


@pytest.mark.parametrize("name", [CONFIG, RECORD_FILE, WEIGHTS_FILE])
def test_an_adapter_without_a_file_names_it(folder, name):
    (folder / name).unlink()
    with pytest.raises(QwenVLLoraError, match=f"(lacks|has no) {name}"):
        Adapter(folder).check_files()


def test_a_damaged_parent_is_refused_before_the_first_node(folder, tmp_path):
    workspace = workspace_folder(tmp_path)
    os.mkfifo(folder / "unread")  # nothing looks at it
    assert find_parent(str(folder), workspace).adapter.path == folder
    (folder / RECORD_FILE).write_text("{}")
    with pytest.raises(AdapterError, match="is not a record of an adapter"):
        find_parent(str(folder), workspace)


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": "all-linear"},
        {"target_modules": r".*language_model.*\.(q|v)_proj"},
        {"target_modules": ["q_proj", "lm_head", "embed_tokens"]},
        {"use_dora": True, "use_rslora": True},
        {"bias": "lora_only"},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "orthogonal"},
        {"init_lora_weights": False},
        {"modules_to_save": ["lm_head"]},
        {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"layers.0.self_attn.q_proj": 32}},
        {"layers_to_transform": [1]},
        {"layers_to_transform": 0, "layers_pattern": "layers"},
    ],
)
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings:UserWarning")
@pytest.mark.filterwarnings("ignore:.*save_embedding_layers:UserWarning")
def test_every_kind_of_adapter_that_training_writes_passes(base, tmp_path, changes):
    lora = LoraParameters(**{**LORA.model_dump(), **changes})
    save_adapter(tmp_path, base, lora)
    use(tmp_path, base)


def require_refused_or_right(damage, sound, base, scratch, data):
    adapter, logits = use(sound, base)
    folder = shutil.copytree(sound, scratch / "damaged")
    damage(data, folder)
    message = ""
    try:
        damaged, theirs = use(folder, base)
    except QwenVLLoraError as error:
        message = str(error)
    finally:
        shutil.rmtree(folder)
    if message:
        assert str(folder) in message
        assert len(message) < 1500
    else:
        assert torch.equal(logits, theirs) or damaged.weights_sha256 != adapter.weights_sha256
        assert torch.isfinite(theirs).all()


def damage_settings(data: st.DataObject, folder: Path) -> None:
    damage_json(data, folder / data.draw(st.sampled_from([CONFIG, RECORD_FILE])))


RANDOM_DAMAGE = settings(
    deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, phases=[Phase.generate]
)
DAMAGES = {
    "file": damage_file,
    "tensor": lambda data, folder: damage_tensor(data, folder / WEIGHTS_FILE),
    "value": damage_settings,
}


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("examples", [6, pytest.param(150, marks=pytest.mark.slow)])
def test_an_adapter_with_random_damage_is_refused_in_words_or_does_what_it_did(
    sound, base, tmp_path_factory, kind, examples
):
    scratch = tmp_path_factory.mktemp("scratch")

    @settings(
        max_examples=examples,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        derandomize=True,
        phases=[Phase.generate],
    )
    @given(data=st.data())
    def damaged(data):
        require_refused_or_right(DAMAGES[kind], sound, base, scratch, data)

    damaged()


@given(name=st.sampled_from(sorted(adapter_record())), value=st.sampled_from(VALUES))
@settings(max_examples=100, deadline=None)
def test_no_value_at_the_top_of_a_record_ends_in_anything_but_words(name, value):
    assert all(isinstance(fault, str) for fault in faults_of_record({**adapter_record(), name: value}))
