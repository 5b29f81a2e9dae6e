"""parameters.yml is checked as a whole, and every fault is named at once."""

import copy
import importlib
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from qwen_vl_lora.exceptions import ParameterError
from qwen_vl_lora.library_parameters import TrainingParameters, library_names
from qwen_vl_lora.lora_parameters import LoraParameters
from qwen_vl_lora.parameters import ExportParameters, validate_parameters

BASE = Path(__file__).parents[1] / "conf" / "base" / "parameters.yml"


@pytest.fixture
def tree():
    return yaml.safe_load(BASE.read_text(encoding="utf-8"))


def changed(tree, key, value):
    tree = copy.deepcopy(tree)
    *parents, last = key.split(".")
    group = tree
    for parent in parents:
        group = group.setdefault(parent, {})
    group[last] = value
    return tree


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("lora.rank", 8, r"lora\.rank: not a name of LoraConfig; nearest: r\b"),
        ("lorra.r", 4, "lorra: unknown key; nearest: lora"),
        ("lora.r", -1, "lora.r: .*greater than 0; got -1"),
        ("lora.r", "8", "lora.r: .*integer; got '8'"),
        ("lora.lora_dropout", 1.0, "lora.lora_dropout: .*less than 1"),
        ("lora.exclude_modules", "(", "lora.exclude_modules: expected a regular expression; got .*missing"),
        ("training_args.learning_rat", 1e-4, "nearest: learning_rate"),
        ("training_args.learning_rate", float("nan"), "training_args.learning_rate: .*finite"),
        ("training_args.output_dir", "x", r"training_args\.output_dir: set by the project"),
        ("training_args.report_to", "all", "use `trackers` of parameters.yml"),
        (
            "trackers",
            "mlflow",
            r"trackers: expected a list of different names, such as \[swanlab, mlflow\]; got 'mlflow'",
        ),
        ("trackers", ["mlflow", "mlflow"], "trackers: expected a list of different names"),
        (
            "trackers",
            ["swanlab", "tensorbord"],
            r"trackers\.1: .*'tensorboard'; got 'tensorbord'; nearest: tensorboard",
        ),
        ("mlflow.tracking_url", "http://x", "mlflow.tracking_url: unknown key; nearest: tracking_uri"),
        ("tensorboard.prediction_images", 51, "less than or equal to 50; got 51"),
        ("training_args.deepspeed", "zero3.json", "would update the weights after each; use fsdp"),
        ("training_args.fsdp", "full_shard", "fsdp: expected true or false; got 'full_shard'"),
        ("training_args.fsdp", True, "shards weights among processes, but there is only one"),
        ("training_args.fsdp_config", {"version": 1}, "other ways were never tested here"),
        ("training_args.per_device_train_batch_size", "aut", "training_args.per_device_train_batch_size: .*'auto'"),
        ("training_args.bf16", "yes", "training_args.bf16: .*boolean"),
        ("image.resized_height", None, "resized_height and resized_width, or min_pixels"),
        ("export.max_shard_size", "big", "expected a size above 0 in KB, MB, GB or TB, such as 5GB; got 'big'"),
        ("export.max_shard_size", "0", "export.max_shard_size: .* got '0'"),
        ("export.max_shard_size", "0GB", "export.max_shard_size: .* got '0GB'"),
        ("export.max_shard_size", "2GiB", "got '2GiB'; nearest: 2GB"),
        ("inference.server.adress", "x", "inference.server.adress: unknown key; nearest: address"),
        (
            "inference.server.address",
            "http://example.com/v1",
            "inference.server: http://example.com/v1 would send pict",
        ),
        ("inference.server.address", "", "inference.server: expected an address such as http://.*; got ''"),
        ("inference.server.address", [], "inference.server: address: expected at least one address, or null"),
        ("inference.server.kind", "vlm", "inference.server.kind: .*'auto', .*; got 'vlm'; nearest: vllm"),
        ("inference.adapter", "newest", "inference.adapter: .*'trained' or 'none'; got 'newest'"),
        ("inference.sampling.temperature", -0.1, "inference.sampling.temperature: .*greater than or equal to 0"),
        (
            "inference.output.jsonl",
            "a.txt",
            "inference.output: jsonl: expected a file that ends with .jsonl; got 'a.txt'",
        ),
        (
            "evaluation.contenders",
            [{"name": "tuned", "adapter": "v"}],
            "another name than base, tuned, reference, tie; .*'tuned'",
        ),
        ("evaluation.contenders", [{"name": "Old", "adapter": "v"}], "evaluation.contenders.0.name: .*; got 'Old'"),
        ("evaluation.contenders", [{"name": "x"}], "x: expected one of adapter, model and server; got none of them"),
        ("evaluation.contenders", [{"name": "x", "adapter": "v", "model": "m"}], "x: .*; got adapter and model"),
        ("evaluation.contenders", [{"name": "x", "adaptr": "v"}], "adaptr: unknown key; nearest: adapter"),
        ("evaluation.contenders", [{"name": "x", "adapter": "v"}] * 2, "a name of its own .*; got x more than once"),
        ("evaluation.contenders", [{"name": "x", "server": {}}], "x: server needs an address"),
        (
            "evaluation.contenders",
            [{"name": "x", "server": {"adress": "y"}}],
            "contenders.0.server.adress: unknown key; nearest: address",
        ),
        (
            "evaluation.contenders",
            [{"name": "x", "server": {"address": "http://example.com/v1"}}],
            "or set evaluation.contenders: server.allow_http: true",
        ),
        ("scoring.by_server", "tuned", "scoring.by_server is `tuned`, but no server is named"),
        ("split.validation_images", 0, "eval_strategy is `epoch` but split.validation_images is 0"),
        ("device", "gpu", "device: .*'auto', 'cpu' or 'cuda'"),
        ("device", "mps", "device: `mps` is not supported: .*Apple's GPUs.*Give cuda"),
        ("device", "npu:1", "device: `npu:1` is not supported: .*Ascend"),
        ("device", "cuda:1", "device: `cuda:1` names one GPU; .*CUDA_VISIBLE_DEVICES=1"),
        ("attention", "flash_attention_2", "flash_attention_2`, which takes no mask .* set rows: separate"),
        ("quantization", "int4", "quantization: .*'nf4' or 'int8'"),
        ("prompt.usr", "x", "prompt.usr: unknown key; nearest: user"),
    ],
)
def test_a_wrong_parameter_is_named_with_what_is_allowed(tree, key, value, message):
    with pytest.raises(ParameterError, match=message):
        validate_parameters(changed(tree, key, value))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("vision", "adapted", "a pass without pictures would skip the adapted tower's; set vision: frozen"),
        ("quantization", "nf4", "quantization is `nf4`, whose packed weights were never sharded here"),
    ],
)
def test_what_was_never_trained_with_shards_is_refused(tree, key, value, message):
    sharded = changed(changed(tree, "training_args.fsdp", True), "cluster.processes", 2)
    assert validate_parameters(sharded).training_args.is_sharded
    with pytest.raises(ParameterError, match=message):
        validate_parameters(changed(sharded, key, value))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"min_pixels": 900, "max_pixels": 800}, "min_pixels 900 is above max_pixels 800"),
        ({"resized_height": 28, "resized_width": 5628}, "differ by a factor of 201; expected at most 200"),
    ],
)
def test_a_size_that_no_picture_can_have_is_refused(tree, given, message):
    sizes = dict.fromkeys(("resized_height", "resized_width", "min_pixels", "max_pixels"))
    with pytest.raises(ParameterError, match=message):
        validate_parameters({**tree, "image": {**tree["image"], **sizes, **given}})


@settings(max_examples=150, deadline=None)
@given(
    st.one_of(
        st.text(max_size=6),
        st.from_regex(r" *[0-9.+e-]{0,5} *([KMGTPk][iI]?[Bb])? *", fullmatch=True),
    )
)
def test_a_size_of_files_that_is_accepted_can_be_read_and_is_not_zero(size):
    """By the function that cuts the merged weights into files."""
    from huggingface_hub.serialization._base import parse_size_to_int

    try:
        export = ExportParameters(dtype="base", max_shard_size=size)
    except ValidationError:
        return
    assert parse_size_to_int(export.max_shard_size) > 0


def test_several_refused_names_of_a_library_are_named_at_once(tree):
    wrong = changed(changed(tree, "training_args.tf32", True), "training_args.learning_rat", 1)
    with pytest.raises(ParameterError, match="2 in all") as caught:
        validate_parameters(wrong)
    assert "training_args.tf32:" in str(caught.value)
    assert "nearest: learning_rate" in str(caught.value)


@pytest.mark.parametrize("key", ["split.test_images", "split.validation_images"])
@pytest.mark.parametrize(
    "value",
    [-1, 1.0, 1.5, 0.0, -0.1, True, None, "", "64", "10", "0%", "100%", "-5%", "10% up to 0", "10% to 64", "ten", [4]],
)
def test_a_size_of_the_split_that_is_no_number_and_no_share_is_refused(tree, key, value):
    with pytest.raises(ParameterError, match=rf"{key}: expected a number of images .*10% up to 64\); got "):
        validate_parameters(changed(tree, key, value))


@pytest.mark.parametrize(
    ("value", "images"),
    [(0, 0), (64, 64), (0.1, 20), ("10%", 20), ("10 %", 20), ("2.5%", 5), ("10% up to 8", 8), ("0.1%", 1)],
)
def test_a_size_of_the_split_is_a_number_a_share_or_a_share_with_a_limit(tree, value, images):
    split = validate_parameters(changed(tree, "split.test_images", value)).split
    assert split.test_images == value
    assert split.held_out("test").of(200) == images


def test_all_faults_are_reported_at_once(tree):
    wrong = changed(changed(tree, "lora.r", 0), "split.test_images", -3)
    with pytest.raises(ParameterError, match="2 in all") as caught:
        validate_parameters(wrong)
    assert "lora.r:" in str(caught.value)
    assert "split.test_images:" in str(caught.value)


def test_a_missing_key_is_named(tree):
    del tree["generation"]["max_new_tokens"]
    with pytest.raises(ParameterError, match="generation.max_new_tokens: required"):
        validate_parameters(tree)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lora.init_lora_weights", "pissa"),
        ("training_args.adam_beta2", 0.99),
        ("training_args.per_device_train_batch_size", "auto"),
        ("training_args.num_train_epochs", 1),
        ("captions_file", "table.csv"),
    ],
)
def test_the_libraries_own_names_and_the_command_line_keys_pass(tree, key, value):
    validate_parameters(changed(tree, key, value))


@pytest.mark.parametrize(
    ("group", "module", "class_name"),
    [(LoraParameters, "peft", "LoraConfig"), (TrainingParameters, "transformers", "TrainingArguments")],
)
def test_names_read_from_the_source_are_fields_of_the_installed_class(group, module, class_name):
    library_class = getattr(importlib.import_module(module), class_name)
    names = library_names(*group.source)
    assert len(names) > 20
    assert names <= set(library_class.__dataclass_fields__)


def test_every_parameter_is_documented_with_its_default(tree):
    from pydantic import BaseModel

    from qwen_vl_lora.parameters import Parameters

    page = (BASE.parents[2] / "docs" / "parameters.md").read_text(encoding="utf-8")
    keys = []
    for name, field in Parameters.model_fields.items():
        group = field.annotation
        if isinstance(group, type) and issubclass(group, BaseModel):
            keys += [f"{name}.{inner}" for inner in group.model_fields]
        else:
            keys.append(name)
    assert [key for key in keys if f"`{key}`" not in page] == []


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("cluster.address", "somewhere", "expected null, auto or HOST:PORT, such as .*; got 'somewhere'"),
        ("cluster.address", "host:99999", "expected null, auto or HOST:PORT"),
        ("cluster.gpus_per_process", 2, "gpus_per_process needs a cluster"),
        ("cluster.processes", 0, "cluster.processes: "),
        ("launcher", {"nproc_per_node": 2}, "launcher: its keys are now cluster.processes"),
        ("training_args.ddp_timeout", 5, "use cluster.timeout"),
    ],
)
def test_processes_that_could_not_meet_are_refused(tree, key, value, message):
    with pytest.raises(ParameterError, match=message):
        validate_parameters(changed(tree, key, value))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training_args.hub_token": "hf_secret"}, "training_args.hub_token: set by the project: the adapter stays"),
        ({"training_args.data_seed": 3}, "training_args.data_seed: set by the project: use seed"),
        ({"lora.bias": "all"}, "lora.bias `all` would train the vision tower's biases too"),
        ({"lora.bias": "lora_only", "training_args.fp16": True}, "biases cannot be trained in float16"),
    ],
)
def test_what_would_train_wrongly_or_be_passed_over_is_refused(tree, changes, message):
    for key, value in changes.items():
        tree = changed(tree, key, value)
    with pytest.raises(ParameterError, match=message) as refused:
        validate_parameters(tree)
    assert "hf_secret" not in str(refused.value)


def test_runs_that_were_stored_before_a_key_existed_are_replayed_with_the_value_of_the_embedded_default(tree):
    older = copy.deepcopy(tree)
    for name in ("nothing_words", "columns", "split_column", "sidecar_lines", "exclude"):
        del older["captions"][name]
    del older["image"]["more_formats"]
    assert validate_parameters(older) == validate_parameters(tree)
