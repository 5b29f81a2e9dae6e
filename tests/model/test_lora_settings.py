"""Every setting of LoRA trains what it names, loads again and merges, or is refused by its key before any training."""

import dataclasses
import re
import tempfile
from pathlib import Path

import peft
import pytest
import torch
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open

from qwen_vl_lora.exceptions import ParameterError
from qwen_vl_lora.lora_parameters import LoraParameters
from qwen_vl_lora.model.adapter import Adapter
from qwen_vl_lora.model.base_model import BaseModel
from qwen_vl_lora.model.lora import add_adapter, check_lora
from qwen_vl_lora.model.lora_checks import adapted_layers
from qwen_vl_lora.model.merging import distance, merge_adapter
from qwen_vl_lora.parameters import ExportParameters, validate_parameters
from qwen_vl_lora.training.movement import module_of
from tiny_adapters import adapter_record, write_record
from tiny_models import FAMILIES

TREE = yaml.safe_load((Path(__file__).parents[2] / "conf" / "base" / "parameters.yml").read_text(encoding="utf-8"))
PLAIN = {**TREE["lora"], "r": 4, "lora_alpha": 8, "lora_dropout": 0.0}
PROJECTIONS = PLAIN["target_modules"]
AS_STORED = ExportParameters(dtype="base", max_shard_size="5GB")
TIED = "ignore:Model has `tie_word_embeddings=True`"


def checked(vision="frozen", quantization=None, **changes):
    tree = {**TREE, "lora": {**PLAIN, **changes}, "vision": vision, "quantization": quantization}
    return validate_parameters(tree).lora


SLOW = [name for name in FAMILIES if name != "qwen2_5_vl"]


@pytest.fixture(scope="module")
def inputs(processor):
    """What the families of Qwen2 make of a picture with a question and an answer."""
    return inputs_of(processor)


def inputs_of(processor):
    text = "<|vision_start|><|image_pad|><|vision_end|>What is it? a small blue circle"
    picture = Image.linear_gradient("L").resize((56, 56)).convert("RGB")
    return dict(processor(text=[text], images=[picture], return_tensors="pt"))


def logits(model, inputs):
    with torch.inference_mode():
        return model.eval()(**inputs).logits.float()


def trained(base, lora, vision, inputs, dtype="float32"):
    """The model after three steps, and the names of its trainable tensors that changed."""
    model = add_adapter(base.load_model(dtype, "cpu"), lora, vision, 0)
    parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
    before = {name: value.detach().clone() for name, value in parameters.items()}
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-3, weight_decay=0.0)
    model.train()
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            model(**inputs, labels=inputs["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, {name for name, value in parameters.items() if not torch.equal(before[name], value)}


def require_moved(lora, moved):
    """Each entry of each list of names stands for a module that changed."""
    targets = lora.target_modules if isinstance(lora.target_modules, list) else []
    for entry in [*targets, *(lora.modules_to_save or [])]:
        assert any(re.search(rf"(^|\.){re.escape(entry)}\.", name) for name in moved), entry
    layers = lora.layers_to_transform if isinstance(lora.layers_to_transform, list) else [lora.layers_to_transform]
    for layer in layers if lora.layers_to_transform is not None else []:
        assert any(f".{layer}." in name for name in moved), layer
    if lora.bias != "none":
        assert any(name.endswith(".bias") for name in moved)


def require_same_elsewhere(model, base, inputs, folder, lora, vision="frozen"):
    """Loaded again, and merged, the model says the same."""
    model.save_pretrained(folder, save_embedding_layers=False)
    write_record(folder, adapter_record(base, lora=lora.model_dump(), vision=vision))
    tuned = logits(model, inputs)
    again = logits(Adapter(folder).attach(base.load_model("float32", "cpu")), inputs)
    assert distance(again, tuned) < 1e-5
    merged = folder / "merged"
    merge_adapter(base, Adapter(folder), merged, AS_STORED, torch.device("cpu"), lambda one: logits(one, inputs))
    assert distance(logits(BaseModel("merged", merged).load_model("float32", "cpu"), inputs), tuned) < 1e-4


def test_every_name_of_the_installed_lora_config_is_supported_or_refused_with_a_reason():
    names = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert names == set(LoraParameters.model_fields) | set(LoraParameters.refused)
    assert set(LoraParameters.model_fields) & set(LoraParameters.refused) == set()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task_type": "CAUSAL_LM"}, "lora.task_type: remove it; the project always trains with"),
        ({"inference_mode": False}, "lora.inference_mode: remove it; the project sets it"),
        ({"loftq_config": {"loftq_bits": 4}}, "lora.loftq_config: .*use quantization"),
        ({"lora_bias": True}, "lora.lora_bias: .*cannot merge.*set bias"),
        ({"arrow_config": {"top_k": 2}}, "lora.arrow_config: "),
        ({"runtime_config": {}}, "lora.runtime_config: "),
        ({"megatron_config": {"a": 1}}, "lora.megatron_config: "),
        ({"alora_invocation_tokens": [5, 6]}, "lora.alora_invocation_tokens: .*no trained prompt"),
        ({"use_qalora": True}, "lora.use_qalora: .*use quantization"),
        ({"init_lora_weights": "eva"}, "lora.init_lora_weights: .*got 'eva'. It needs a pass over the data"),
        ({"init_lora_weights": "corda"}, "lora.init_lora_weights: .*got 'corda'"),
        ({"init_lora_weights": "lora_ga"}, "lora.init_lora_weights: .*got 'lora_ga'. It needs gradients"),
        ({"init_lora_weights": "pissa_niter_4"}, "lora.init_lora_weights: .*cannot be repeated.*use pissa"),
        ({"init_lora_weights": "orthogonal", "r": 3}, "lora.init_lora_weights: .*even ranks; got 3"),
        ({"init_lora_weights": "pissa", "quantization": "nf4"}, "lora.init_lora_weights is `pissa`.*quantization"),
        ({"target_modules": "("}, r"lora.target_modules: expected a regular expression; got '\('"),
        ({"target_modules": ["q_proj", ".*v_proj"]}, "lora.target_modules: .*got '.*v_proj'"),
        ({"target_modules": []}, "lora.target_modules: the list is empty"),
        ({"exclude_modules": ["q_proj)"]}, "lora.exclude_modules: "),
        ({"modules_to_save": "lm_head"}, r"lora.modules_to_save: expected a list.*got 'lm_head'"),
        ({"rank_pattern": {"*": 3}}, "lora.rank_pattern: expected a regular expression"),
        ({"alpha_pattern": {"q_proj": 0}}, "lora.alpha_pattern.q_proj: "),
        ({"layers_to_transform": []}, "lora.layers_to_transform: the list is empty"),
        ({"layers_to_transform": [-1]}, "lora.layers_to_transform: expected an index"),
        ({"layers_to_transform": [0], "target_modules": ".*q_proj"}, "lora.layers_to_transform: .*is the text"),
        ({"layers_pattern": "layers"}, "lora.layers_pattern: .*applies to layers_to_transform, which is not given"),
        ({"lora_alpah": 8}, "lora.lora_alpah: .*nearest: lora_alpha"),
    ],
)
def test_a_setting_that_would_do_nothing_here_is_refused_by_its_key_with_the_remedy(changes, message):
    with pytest.raises(ParameterError, match=message):
        checked(**changes)


def test_what_is_not_given_stands_in_no_record():
    assert checked().model_dump() == PLAIN
    assert checked(exclude_modules=None).model_dump() == PLAIN
    assert checked(modules_to_save=["lm_head"]).model_dump() == {**PLAIN, "modules_to_save": ["lm_head"]}


@pytest.mark.parametrize(
    ("vision", "changes", "message"),
    [
        ("frozen", {"target_modules": ["q_proj", "v_prj"]}, "target_modules: 'v_prj' matches no .*; nearest: v_proj"),
        ("frozen", {"target_modules": ["q_proj", "qkv"]}, "target_modules: 'qkv' .*vision tower only.*vision: adapted"),
        ("frozen", {"target_modules": "q_proj"}, "target_modules: the .* 'q_proj' matches no layer.*give a list"),
        ("frozen", {"target_modules": ["q_proj", "mlp"]}, "target_modules: 'mlp' matches no module"),
        ("frozen", {"target_modules": r".*\.mlp"}, "target_modules: .*mlp' matches .*a \\w+, which cannot take LoRA"),
        ("frozen", {"modules_to_save": ["classifier"]}, "modules_to_save: 'classifier' matches no module"),
        ("frozen", {"modules_to_save": ["norm"]}, "modules_to_save: 'norm' names .*such as 'language_model.norm'"),
        ("frozen", {"modules_to_save": ["act_fn"]}, "modules_to_save: 'act_fn' .*no weights"),
        ("frozen", {"modules_to_save": ["merger"]}, "modules_to_save: 'merger' .*vision tower"),
        ("frozen", {"modules_to_save": ["model"]}, "modules_to_save: 'model' "),
        ("frozen", {"modules_to_save": ["o_proj"]}, "target_modules: 'o_proj' .*modules_to_save"),
        ("frozen", {"modules_to_save": ["layers"]}, "modules_to_save: PEFT refuses|target_modules: .*leaves out"),
        ("frozen", {"modules_to_save": ["mlp", "gate_proj"]}, "modules_to_save: 'gate_proj' .*part of .*mlp"),
        ("frozen", {"exclude_modules": ["k_prj"]}, "exclude_modules: 'k_prj' matches no .*; nearest: k_proj"),
        ("frozen", {"exclude_modules": ["k_proj"]}, "target_modules: 'k_proj' .*exclude_modules"),
        ("frozen", {"exclude_modules": "nothing.*"}, "exclude_modules: the regular expression"),
        ("frozen", {"exclude_modules": ".*"}, "exclude_modules: PEFT refuses"),
        ("adapted", {"exclude_modules": ["visual"]}, "exclude_modules: 'visual' matches no module"),
        ("frozen", {"layers_to_transform": [1, 27]}, "layers_to_transform: 27 adapts no layer; .*from 0 to 1"),
        ("frozen", {"layers_to_transform": 2}, "layers_to_transform: PEFT refuses 2"),
        ("frozen", {"layers_to_transform": 1, "layers_pattern": ["layers", "h"]}, "layers_pattern: 'h' "),
        ("frozen", {"layers_to_transform": 1, "target_modules": ["q_proj", "embed_tokens"]}, "target_modules: 'embed_"),
        ("frozen", {"rank_pattern": {"v_prj": 8}}, "rank_pattern: 'v_prj' matches no adapted layer"),
        ("frozen", {"rank_pattern": {".*proj": 8, "q_proj": 2}}, "rank_pattern: '.*' and 'q_proj' both match"),
        ("frozen", {"alpha_pattern": {"o_proj": 5, "layers.0.*": 8}}, "alpha_pattern: 'o_proj' and .* both match"),
        ("frozen", {"alpha_pattern": {"^layers": 8}}, r"alpha_pattern: '\^layers' matches no"),
        ("frozen", {"use_dora": True, "target_modules": ["q_proj", "lm_head"]}, "use_dora: .*lm_head.*NaN"),
        ("frozen", {"bias": "lora_only", "target_modules": ["o_proj"]}, "bias: `lora_only` trains nothing"),
        (
            "frozen",
            {"init_lora_weights": "pissa", "r": 64},
            r"init_lora_weights: `pissa` can give .*k_proj at most rank",
        ),
        (
            "frozen",
            {"init_lora_weights": "olora", "target_modules": ["embed_tokens"]},
            "init_lora_weights: .*embedding",
        ),
    ],
)
def test_what_does_not_fit_the_base_is_refused_by_its_key(base_path, vision, changes, message):
    base, lora = BaseModel("tiny", base_path("qwen2_vl")), checked(vision, **changes)
    with pytest.raises(ParameterError, match=f"lora.({message})"):
        check_lora(base, lora, vision)


@pytest.mark.parametrize(
    "changes",
    [{"target_modules": ["q_proj", "v_prj"]}, {"layers_to_transform": [1, 27]}, {"rank_pattern": {"v_prj": 8}}],
)
def test_a_base_that_was_fetched_by_the_run_is_checked_when_it_is_loaded(base_path, changes):
    (key,) = changes
    model = BaseModel("tiny", base_path("qwen2_vl")).load_model("float32", "cpu")
    with pytest.raises(ParameterError, match=f"lora.{key}: "):
        add_adapter(model, checked(**changes), "frozen", 0)


def test_a_whole_module_that_quantization_packs_is_refused(base_path):
    base, lora = BaseModel("tiny", base_path("qwen2_vl")), checked(modules_to_save=["lm_head"])
    check_lora(base, lora, "frozen", quantized=True)
    packed = checked(target_modules=["gate_proj"], modules_to_save=["self_attn"])
    with pytest.raises(
        ParameterError,
        match="lora.modules_to_save: 'self_attn' .*packed by quantization; remove it",
    ):
        check_lora(base, packed, "frozen", quantized=True)


def test_all_faults_are_named_at_once(base_path):
    lora = checked(target_modules=["q_proj", "v_prj"], modules_to_save=["classifier"])
    with pytest.raises(ParameterError, match=r"the block lora, 2 in.*\n.*target_modules.*\n.*modules_to_save"):
        check_lora(BaseModel("tiny", base_path("qwen2_vl")), lora, "frozen")


@pytest.mark.parametrize("exclude", [["layers.0.self_attn.q_proj"], r".*layers\.0\.self_attn\.q_proj"])
@pytest.mark.parametrize("vision", ["frozen", "adapted"])
def test_excluded_modules_are_left_out_and_the_tower_as_vision_says(base_path, exclude, vision):
    base = BaseModel("tiny", base_path("qwen2_5_vl"))
    model = add_adapter(base.load_model("float32", "cpu"), checked(vision, exclude_modules=exclude), vision, 0)
    adapted = set(adapted_layers(model))
    assert "model.language_model.layers.0.self_attn.q_proj" not in adapted
    assert "model.language_model.layers.1.self_attn.q_proj" in adapted
    assert any("visual" in name for name in adapted) is (vision == "adapted")


@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "changes",
    [
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["lm_head", "embed_tokens"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["lm_head", "embed_tokens"], "use_rslora": True},
    ],
)
def test_both_ends_of_the_model_train_and_merge_whether_tied_or_not(base_path, inputs, tmp_path, changes, tied):
    base, lora = BaseModel("tiny", base_path("qwen2_vl", tied=tied)), checked(**changes)
    model, moved = trained(base, lora, "frozen", inputs)
    require_moved(lora, moved)
    require_same_elsewhere(model, base, inputs, tmp_path, lora)
    assert BaseModel("merged", tmp_path / "merged").config["tie_word_embeddings"] is False


@pytest.mark.parametrize(
    ("vision", "changes"),
    [
        ("frozen", {"init_lora_weights": "pissa"}),
        ("frozen", {"init_lora_weights": "olora", "use_dora": True}),
        ("frozen", {"init_lora_weights": "orthogonal"}),
        ("frozen", {"init_lora_weights": False, "use_rslora": True}),
        ("frozen", {"init_lora_weights": "gaussian", "rank_pattern": {"q_proj": 8}, "alpha_pattern": {"1.*v_proj": 3}}),
        ("frozen", {"target_modules": "all-linear"}),
        ("frozen", {"layers_to_transform": [1], "layers_pattern": "layers"}),
        ("frozen", {"modules_to_save": ["input_layernorm", "language_model.norm"]}),
        ("frozen", {"target_modules": ["gate_proj"], "modules_to_save": ["self_attn"]}),
        ("adapted", {"target_modules": ["q_proj", "qkv", "proj"], "modules_to_save": ["merger"], "bias": "all"}),
    ],
)
@pytest.mark.parametrize("family", ["qwen2_5_vl", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_each_supported_setting_trains_what_it_names_loads_again_and_merges(
    base_path, tmp_path, family, vision, changes
):
    base, lora = BaseModel("tiny", base_path(family)), checked(vision, **changes)
    inputs = inputs_of(base.load_processor())
    check_lora(base, lora, vision)
    model, moved = trained(base, lora, vision, inputs)
    require_moved(lora, moved)
    require_same_elsewhere(model, base, inputs, tmp_path, lora, vision)


def test_whole_modules_learn_in_half_precision_too(base_path, inputs):
    """A weight of 1.0 in bfloat16 takes no step below 0.004."""
    base = BaseModel("tiny", base_path("qwen2_vl"))
    lora = checked(target_modules=["q_proj"], modules_to_save=["language_model.norm", "lm_head", "self_attn.o_proj"])
    _, moved = trained(base, lora, "frozen", inputs, "bfloat16")
    require_moved(lora, moved)


NAMES = [*PROJECTIONS, "lm_head", "embed_tokens", "self_attn.q_proj", "qkv", "v_prj", "mlp", "norm", "merger", "visual"]
NAMES += ["in_proj_qkv", "out_proj", "conv1d", "linear_attn", "linear_fc2", "deepstack_merger_list.0", "pos_embed"]
LISTS = st.lists(st.sampled_from(NAMES), max_size=3)
PATTERNS = st.sampled_from([".*q_proj", "all-linear", "q_proj", "(", "", r".*layers\.1\..*_proj", ".*visual.*", ".*"])
ANY = st.none() | st.booleans() | st.integers(-2, 3) | st.text(max_size=3) | st.lists(st.integers(0, 3), max_size=2)
INDICES = st.integers(-1, 3) | st.lists(st.integers(-1, 3), max_size=2)
BY_NAME = st.dictionaries(st.sampled_from([*NAMES, ".*", "layers.0.*", "("]), st.integers(0, 9), max_size=2)
STARTS = st.booleans() | st.sampled_from(
    ["gaussian", "pissa", "olora", "orthogonal", "pissa_niter_2", "eva", "corda", "loftq", "lora_ga", "mica", "x"]
)
VALUES = {
    "r": st.integers(-1, 40),
    "lora_alpha": st.integers(-1, 40),
    "lora_dropout": st.sampled_from([-0.1, 0.0, 0.5, 1.0]),
    "bias": st.sampled_from(["none", "all", "lora_only", "some"]),
    "target_modules": LISTS | PATTERNS,
    "exclude_modules": LISTS | PATTERNS,
    "modules_to_save": LISTS,
    "layers_to_transform": INDICES,
    "layers_pattern": st.sampled_from(["layers", "h", ["layers", "blocks"], []]),
    "rank_pattern": BY_NAME,
    "alpha_pattern": BY_NAME,
    "use_rslora": st.booleans(),
    "use_dora": st.booleans(),
    "init_lora_weights": STARTS,
}
OTHERS = sorted({field.name for field in dataclasses.fields(peft.LoraConfig)} - set(VALUES))
SUPPORTED = st.fixed_dictionaries({}, optional=VALUES)
WHOLE = SUPPORTED | st.tuples(SUPPORTED, st.dictionaries(st.sampled_from(OTHERS), ANY, max_size=2)).map(
    lambda both: {**both[0], **both[1]}
)
FEW = WHOLE.map(lambda given: dict(list(given.items())[:4]))


def require_trained_or_refused(base, inputs, vision, changes):
    keys = "|".join(f"lora.{re.escape(name)}" for name in changes) or "nothing"
    try:
        lora = checked(vision, **changes)
        check_lora(base, lora, vision)
    except ParameterError as error:
        # A list of targets may be at odds with another setting: PLAIN's own is then named.
        if re.search(f"{keys}|lora.target_modules", str(error)) is None:
            raise
        return
    model, moved = trained(base, lora, vision, inputs)
    require_moved(lora, moved)
    trainable = {name for name, value in model.named_parameters() if value.requires_grad}
    assert {module_of(name) for name in trainable} == {module_of(name) for name in moved}
    with tempfile.TemporaryDirectory() as folder:
        require_same_elsewhere(model, base, inputs, Path(folder), lora, vision)


@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(vision=st.sampled_from(["frozen", "adapted"]), changes=FEW)
@example(vision="frozen", changes={"target_modules": ["q_proj", "v_prj"]})
@example(vision="frozen", changes={"alora_invocation_tokens": [5, 6]})
def test_random_settings_train_what_they_name_or_are_refused_by_their_key(base_path, inputs, vision, changes):
    require_trained_or_refused(BaseModel("tiny", base_path("qwen2_vl")), inputs, vision, changes)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(family=st.sampled_from(FAMILIES), tied=st.booleans(), vision=st.sampled_from(["frozen", "adapted"]), changes=FEW)
def test_many_random_settings_train_what_they_name_or_are_refused_by_their_key(
    base_path, family, tied, vision, changes
):
    base = BaseModel("tiny", base_path(family, tied=tied))
    require_trained_or_refused(base, inputs_of(base.load_processor()), vision, changes)


def test_lora_on_an_embedding_brings_no_weights_of_the_base_into_the_adapter(base_path, inputs, tmp_path):
    base, lora = BaseModel("tiny", base_path("qwen2_vl")), checked(target_modules=["embed_tokens"])
    model, _ = trained(base, lora, "frozen", inputs)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert all("lora_" in name for name in file.keys())  # noqa: SIM118
