"""A base is what its fingerprint says: every file that is read is part of it, and what is damaged is refused in words.

On commit 981ed87 a planted adapter was loaded with its base, a base without a tensor loaded with random numbers, and
damaged files ended in tracebacks of json, jinja, tokenizers and safetensors.
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

from model.damage import DAMAGED_FILES, damage_file, damage_json, damage_tensor, edit_json, edit_weights
from qwen_vl_lora.datasets.base_model import BaseModelDataset
from qwen_vl_lora.exceptions import BaseModelError, QwenVLLoraError
from qwen_vl_lora.model.base_files import side_files
from qwen_vl_lora.model.base_model import BaseModel
from qwen_vl_lora.model.fingerprints import weights_sha256
from qwen_vl_lora.runs.storage import file_sha256
from security.watching import watched
from tiny_adapters import save_adapter

SHIPPED = Path(__file__).parents[2] / "data" / "06_models" / "tiny_qwen2_vl"
WEIGHTS = "model.safetensors"
ALWAYS_THINKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ '<think>\n\n</think>\n\n' if m.role == 'assistant' }}"
    "{% for part in m.content %}{{ part.text or '<|vision_start|><|image_pad|><|vision_end|>' }}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
"""As the templates of the Thinking checkpoints, which know no `enable_thinking`."""


@pytest.fixture
def folder(base_path, tmp_path):
    """A private copy of a tiny base."""
    return shutil.copytree(base_path("qwen2_vl"), tmp_path / "base")


def check(folder):
    """What `kedro run` looks at before its first node."""
    BaseModelDataset(model=str(folder)).check()


def test_the_fingerprint_of_a_base_with_the_known_files_alone_is_that_of_commit_981ed87():
    assert BaseModel("tiny", SHIPPED).fingerprint == "7cc7340a45d92fe7463a68a7489fd41847da0348284085d127607741d3a8d11c"


def test_an_adapter_in_a_bases_folder_is_refused_by_name(folder, base_path):
    save_adapter(folder, BaseModel("tiny", base_path("qwen2_vl")))
    with pytest.raises(BaseModelError, match=r"has adapter_config\.json: transformers would put that adapter on"):
        check(folder)


@pytest.mark.parametrize("name", ["adapter_config.json", "audio_tokenizer_config.json"])
def test_a_configuration_that_leads_to_another_model_is_refused_by_name(folder, name):
    (folder / name).write_text("{}")
    with pytest.raises(BaseModelError, match=f"has {name}"):
        check(folder)


READ_WHERE_THEY_LIE = {
    "video_preprocessor_config.json": "{}",
    "special_tokens_map.json": "{}",
    "added_tokens.json": "{}",
    "vocab.txt": "a\nb\n",
    "additional_chat_templates/other.jinja": "{{ messages }}",
}


@pytest.mark.parametrize("name", READ_WHERE_THEY_LIE)
def test_a_further_file_that_is_read_joins_the_fingerprint(folder, base_path, name):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(READ_WHERE_THEY_LIE[name])
    base = BaseModel("tiny", folder)
    assert base.files.keys() - BaseModel("tiny", base_path("qwen2_vl")).files.keys() == {name}
    assert base.fingerprint != BaseModel("tiny", base_path("qwen2_vl")).fingerprint


@pytest.mark.parametrize(
    "name",
    ["README.md", "LICENSE", "model.gguf", "cat.png", "pytorch_model.bin", "model.pt", ".gitattributes", "notes.json"],
)
def test_a_file_that_nothing_reads_is_ignored(folder, base_path, name):
    (folder / name).write_bytes(b"\xff\xfe anything")
    check(folder)
    assert BaseModel("tiny", folder).fingerprint == BaseModel("tiny", base_path("qwen2_vl")).fingerprint


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # transformers leaves a template open
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.parametrize("split_tokenizer", [False, True])
def test_whatever_loading_opens_is_fingerprinted(folder, split_tokenizer):
    """Every name that transformers, tokenizers or PEFT look for is there, so a file that is missed would be opened."""
    for name, text in {**READ_WHERE_THEY_LIE, "modelcard.json": "{}", "params.json": "{}"}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    for name in ("adapter_model.safetensors.index.json", "pytorch_model.bin.index.json", "tokenizer.model.v3"):
        (folder / name).write_text("{}")
    if split_tokenizer:  # the oldest form of a tokenizer's files
        model = json.loads((folder / "tokenizer.json").read_text())["model"]
        (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
        (folder / "merges.txt").write_text("\n".join(" ".join(pair) for pair in model["merges"]))
    base = BaseModel("tiny", folder)
    known = {str(folder / name) for name in base.files}
    with watched() as events:
        base.load_structure()
        base.load_processor()
        base.load_model("float32", "cpu")
        base.load_vision_tower("float32", "cpu")
    opened = {event.split("'")[1] for event in events if event.startswith("open") and str(folder) in event}
    assert opened <= known
    assert str(folder / "additional_chat_templates" / "other.jinja") in opened  # what is watched is what happens


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("config.json", {"transformers_weights": "other.safetensors"}),
        ("config.json", {"quantization_config": {"quant_method": "awq"}}),
        ("config.json", {"configuration_files": ["config.4.0.0.json"]}),
        ("config.json", {"fusion_config": {}}),
        ("tokenizer_config.json", {"fast_tokenizer_files": ["tokenizer.4.0.0.json"]}),
        ("processor_config.json", {"audio_tokenizer": {"audio_tokenizer_name_or_path": "/elsewhere"}}),
    ],
)
def test_a_key_that_leads_to_other_files_or_weights_is_refused_by_name(folder, file, change):
    edit_json(folder / file, **change)
    with pytest.raises(BaseModelError, match=f"is not plain: {next(iter(change))} in {file}"):
        check(folder)


def drop(name):
    return lambda weights: weights.pop(name)


def replace(name, change):
    def edit(weights):
        weights[name] = change(weights[name]).contiguous()

    return edit


LAYER = "model.layers.1.mlp.up_proj.weight"
TOWER = "visual.blocks.1.attn.qkv.weight"

DAMAGED_WEIGHTS = {
    "a missing tensor": (drop(LAYER), "it lacks model.language_model.layers.1.mlp.up_proj.weight"),
    "a missing tensor of the tower": (drop(TOWER), f"it lacks model.{TOWER}"),
    "a surplus tensor": (lambda w: w.update(extra=torch.zeros(3)), "it has no place for extra"),
    "another shape": (replace(LAYER, lambda t: t[:, :-1]), "mismatch"),
    "another shape of the same size": (replace(LAYER, lambda t: t.T), "mismatch"),
    "whole numbers": (replace(LAYER, lambda t: t.to(torch.int8)), f"the tensor {LAYER} has the type I8; expected F64"),
    "complex numbers": (replace(TOWER, lambda t: t.to(torch.complex64)), f"the tensor {TOWER} has the type C64"),
    "a tower under two names": (
        lambda w: w.update({f"model.{TOWER}": w[TOWER].clone()}),
        "has the tensor visual.blocks.1.attn.qkv.weight more than once",
    ),
    "a layer under two names": (
        lambda w: w.update({LAYER.replace("model.", "model.language_model."): w[LAYER].clone()}),
        "has the tensor model.layers.1.mlp.up_proj.weight more than once",
    ),
}


@pytest.mark.parametrize("damage", DAMAGED_WEIGHTS)
def test_weights_that_are_not_those_of_the_architecture_are_refused_before_they_are_read(folder, damage):
    change, message = DAMAGED_WEIGHTS[damage]
    edit_weights(folder / WEIGHTS, change)
    with pytest.raises(BaseModelError, match=message):
        check(folder)
    with pytest.raises(BaseModelError):
        BaseModel("tiny", folder).load_model("float32", "cpu")
    if "tower" in damage or "numbers" in damage:
        with pytest.raises(BaseModelError):
            BaseModel("tiny", folder).load_vision_tower("float32", "cpu")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [LAYER, TOWER])
def test_a_weight_that_is_not_finite_is_refused_when_the_fingerprint_is_made(folder, name, value):
    edit_weights(folder / WEIGHTS, lambda weights: weights[name].view(-1)[-1:].fill_(value))
    for use in (
        lambda base: base.fingerprint,
        lambda base: base.load_model("float32", "cpu"),
        lambda base: base.load_vision_tower("float32", "cpu"),
    ):
        with pytest.raises(BaseModelError, match=f"tensor {name} has values that are NaN or infinite"):
            use(BaseModel("tiny", folder))


FLOATS = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("place", [0, 7, 2_999_999])
def test_not_finite_is_told_by_type_and_at_every_place(tmp_path, dtype, place):
    bits = {8: torch.uint8, 16: torch.int16, 32: torch.int32, 64: torch.int64}[torch.finfo(dtype).bits]
    largest = torch.full((3_000_000,), torch.finfo(dtype).max, dtype=torch.float64).to(dtype)
    largest[1::2] = torch.finfo(dtype).min
    file = tmp_path / "w.safetensors"
    save_file({"small": torch.ones(3, dtype=torch.float32), "large": largest, "none": torch.zeros(0)}, file)
    assert weights_sha256(file) == file_sha256(file)
    for bad in [float("nan"), *([float("inf")] if dtype != torch.float8_e4m3fn else [])]:
        damaged = largest.clone()
        damaged.view(bits)[place] = torch.tensor([bad]).to(dtype).view(bits)[0]
        save_file({"small": torch.ones(3), "large": damaged}, file)
        with pytest.raises(BaseModelError, match="tensor large has values that are NaN or infinite"):
            weights_sha256(file)


@pytest.mark.parametrize("damage", DAMAGED_FILES)
@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "tokenizer_config.json", "processor_config.json", WEIGHTS]
)
def test_a_damaged_file_is_one_message_that_names_it(folder, name, damage):
    DAMAGED_FILES[damage](folder / name)
    with pytest.raises(QwenVLLoraError, match=name.replace(".", r"\.")) as refused:
        BaseModel("tiny", folder).check()
    assert "Fetch" in str(refused.value) or "model directory" in str(refused.value)
    assert len(str(refused.value)) < 1000


@pytest.mark.parametrize("damage", sorted(set(DAMAGED_FILES) - {"a list", "a key twice", "not a number", "cut"}))
def test_a_damaged_chat_template_is_one_message(folder, damage):
    DAMAGED_FILES[damage](folder / "chat_template.jinja")
    with pytest.raises(QwenVLLoraError, match=r"chat.template"):
        check(folder)


@pytest.mark.parametrize(
    "template",
    [
        "{% for",
        "{{ messages | no_such_filter }}",
        "{{ raise_exception('no') }}",
        "{{ messages[0].nothing.at.all }}",
        "a template that shows nothing",
        "{{ messages[0]['content'][1]['text'] }}",
        "{% for part in messages[0].content %}<|image_pad|>{% endfor %}",
        ALWAYS_THINKS,
    ],
)
def test_a_chat_template_that_does_not_work_is_refused_before_the_first_node(folder, template):
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(BaseModelError, match="chat template"):
        check(folder)


@pytest.mark.parametrize("names", [["processor_config.json"], ["chat_template.jinja"], ["tokenizer.json"]])
def test_a_base_without_a_part_of_its_processor_is_refused_before_the_first_node(folder, names):
    for name in names:
        (folder / name).unlink()
    with pytest.raises(BaseModelError, match="base"):
        check(folder)


def test_a_tokenizer_that_is_larger_than_the_vocabulary_is_refused(folder):
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary |= {f"word{n}": max(vocabulary.values()) + 100 + n for n in range(200)}
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(BaseModelError, match=r"the tokenizer has \d+ tokens, but config.json says vocab_size"):
        check(folder)


def test_a_hub_cache_of_links_to_files_is_a_base(folder, tmp_path, base_path):
    (tmp_path / "blobs").mkdir()
    for path in list(folder.iterdir()):
        path.rename(tmp_path / "blobs" / path.name)
        path.symlink_to(Path("../blobs") / path.name)
    check(folder)
    assert BaseModel("tiny", folder).fingerprint == BaseModel("tiny", base_path("qwen2_vl")).fingerprint


@pytest.mark.parametrize("difference", [0.0, 1.0])
def test_an_output_layer_that_is_stored_beside_a_tied_embedding_must_equal_it(folder, difference):
    tied = "model.embed_tokens.weight"
    edit_weights(folder / WEIGHTS, lambda weights: weights.update({"lm_head.weight": weights[tied] + difference}))
    if difference:
        with pytest.raises(BaseModelError, match="lm_head.weight and embed_tokens.weight with different values"):
            BaseModel("tiny", folder).load_model("float32", "cpu")
    else:
        model = BaseModel("tiny", folder).load_model("float32", "cpu")
        assert model.lm_head.weight is model.get_input_embeddings().weight


def shard(folder):
    """The one file as two with an index; the second holds `LAYER` and `TOWER`."""
    weights = load_file(folder / WEIGHTS)
    parts = {
        "model-00001-of-00002.safetensors": {n: value for n, value in weights.items() if n not in (LAYER, TOWER)},
        "model-00002-of-00002.safetensors": {LAYER: weights[LAYER], TOWER: weights[TOWER]},
    }
    for name, part in parts.items():
        save_file(part, folder / name, metadata={"format": "pt"})
    weight_map = {tensor: name for name, part in parts.items() for tensor in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / WEIGHTS).unlink()
    return parts


def test_a_base_in_shards_loads_as_the_whole_one(folder, base_path):
    shard(folder)
    check(folder)
    whole = BaseModel("tiny", base_path("qwen2_vl")).load_model("float32", "cpu").state_dict()
    for name, value in BaseModel("tiny", folder).load_model("float32", "cpu").state_dict().items():
        assert torch.equal(value, whole[name])


def test_one_file_of_weights_beside_an_index_is_refused(folder, base_path):
    shard(folder)
    shutil.copyfile(base_path("qwen2_vl") / WEIGHTS, folder / WEIGHTS)
    with pytest.raises(BaseModelError, match=r"has model\.safetensors and model\.safetensors\.index\.json"):
        check(folder)


@pytest.mark.parametrize(
    "name", ["consolidated.safetensors", "adapter_model.safetensors", "shard-00001-model-00001-of-00001.safetensors"]
)
def test_weights_that_are_not_loaded_are_refused_by_name(folder, name):
    shutil.copyfile(folder / WEIGHTS, folder / name)
    with pytest.raises(BaseModelError, match=f"has weights that are not loaded: {name}"):
        check(folder)


def test_a_tensor_that_the_index_puts_into_another_shard_is_refused(folder):
    shard(folder)
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(f'"{LAYER}": "model-00002', f'"{LAYER}": "model-00001'))
    with pytest.raises(BaseModelError, match=f"differ: tensor {LAYER}"):
        check(folder)


def test_a_tensor_in_two_shards_is_refused(folder):
    parts = shard(folder)
    first = "model-00001-of-00002.safetensors"
    save_file(
        {**parts[first], LAYER: torch.zeros_like(parts["model-00002-of-00002.safetensors"][LAYER])}, folder / first
    )
    with pytest.raises(BaseModelError, match="up_proj.weight more than once"):
        check(folder)


def test_no_kind_of_damage_waits_for_a_writer(folder):
    """A FIFO in place of any file that is read, or beside them, is told and not opened."""
    for path in [*side_files(folder), folder / WEIGHTS, folder / "adapter_config.json", folder / "README.md"]:
        kept = path.read_bytes() if path.is_file() else None
        path.unlink(missing_ok=True)
        os.mkfifo(path)
        if path.name == "README.md":
            BaseModel("tiny", folder).check()
        else:
            with pytest.raises(BaseModelError, match="FIFO; expected a regular file"):
                BaseModel("tiny", folder).check()
        path.unlink()
        if kept is not None:
            path.write_bytes(kept)
    BaseModel("tiny", folder).check()


def behaviour(folder):
    """What a run would compute with the base: the check before it, a picture and a question to logits."""
    base = BaseModel("tiny", folder)
    base.check()
    base.check_loads()
    model, processor = base.load_model("float32", "cpu"), base.load_processor()
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Describe this picture."}]}]
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    picture = torch.arange(3 * 56 * 56, dtype=torch.uint8).reshape(3, 56, 56)
    inputs = processor(text=[text], images=[picture], do_resize=False, return_tensors="pt")
    with torch.inference_mode():
        logits = model(**inputs).logits
    return base.fingerprint, logits


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6]},
        {"rope_type": "default", "rope_theta": 1e4, "mrope_section": ["x", 6, 6]},
        {"rope_type": "default", "rope_theta": 1e4},
    ],
)
def test_a_configuration_that_only_computing_would_find_wrong_is_refused_before_the_first_node(folder, rope):
    config = json.loads((folder / "config.json").read_text())
    edit_json(folder / "config.json", text_config={**config["text_config"], "rope_parameters": rope})
    with pytest.raises(BaseModelError, match="Cannot (load|compute with) base model"):
        check(folder)


def require_refused_or_right(damage, sound, tmp_path_factory, data):
    fingerprint, logits = behaviour(sound)
    folder = shutil.copytree(sound, tmp_path_factory.mktemp("damaged") / "base")
    damage(data, folder)
    message = ""
    try:
        found, theirs = behaviour(folder)
    except QwenVLLoraError as error:
        message = str(error)
    finally:
        shutil.rmtree(folder)
    if message:
        assert str(folder) in message
        assert len(message) < 1500
    else:
        assert found != fingerprint or torch.equal(logits, theirs)
        assert torch.isfinite(theirs).all()


JSON_FILES = [
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
]
RANDOM_DAMAGE = settings(
    deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, phases=[Phase.generate]
)
DAMAGES = {
    "file": damage_file,
    "tensor": lambda data, folder: damage_tensor(data, folder / WEIGHTS),
    "value": lambda data, folder: damage_json(data, folder / data.draw(st.sampled_from(JSON_FILES))),
}


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("examples", [6, pytest.param(150, marks=pytest.mark.slow)])
def test_a_base_with_random_damage_is_refused_in_words_or_is_what_its_fingerprint_says(
    base_path, tmp_path_factory, kind, examples
):
    @settings(
        max_examples=examples,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        derandomize=True,
        phases=[Phase.generate],
    )
    @given(data=st.data())
    def damaged(data):
        require_refused_or_right(DAMAGES[kind], base_path("qwen2_vl"), tmp_path_factory, data)

    damaged()
