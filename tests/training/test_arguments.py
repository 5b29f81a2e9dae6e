"""Each name of training_args that is allowed does what it says; all others are refused before anything is trained."""

import copy
import math
import re
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from qwen_vl_lora.exceptions import DeviceError, ParameterError
from qwen_vl_lora.library_parameters import TrainingParameters, library_names
from qwen_vl_lora.parameters import LoraParameters, validate_parameters
from qwen_vl_lora.training.arguments import (
    check_arguments,
    check_schedule,
    training_arguments,
)
from qwen_vl_lora.training.fit import usable_settings
from qwen_vl_lora.training.loop import TrainingLoop
from training.test_fit import PARAMETERS, TRAINING, fit  # noqa: F401

TESTS = Path(__file__).parents[1]
TREE = yaml.safe_load(PARAMETERS.read_text(encoding="utf-8"))
HERE = "training/test_arguments.py::test_"
STEPS = f"{HERE}steps_logs_and_validations_are_those_that_were_asked_for"
RATES = f"{HERE}rates_are_those_of_the_schedule_and_its_settings"
OPTIMIZER = f"{HERE}the_optimizer_has_the_values_that_were_asked_for"
WEIGHTS = f"{HERE}a_value_changes_the_weights_that_are_trained"
CHECKPOINTS = f"{HERE}checkpoints_are_written_and_kept_as_asked_for"
BEST = "faults/test_training.py::test_training_stops_early_and_publishes_the_step_of_the_best_validation"
PIPELINE = "pipelines/test_training.py::test_"
EFFECTS = {
    "per_device_train_batch_size": f"{PIPELINE}an_automatic_batch_size_changes_the_cut_and_not_the_result",
    "gradient_checkpointing": f"{PIPELINE}checkpointed_activations_give_the_same_adapter",
    "fp16": f"{HERE}a_gpu_without_bfloat16_trains_in_float16",
    "fsdp": "training/test_sharding.py::test_two_ranks_with_half_the_weights_each_give_the_adapter_of_one_process",
    **dict.fromkeys(("gradient_accumulation_steps", "per_device_eval_batch_size", "num_train_epochs"), STEPS),
    **dict.fromkeys(("logging_strategy", "logging_first_step", "eval_strategy", "eval_steps"), STEPS),
    **dict.fromkeys(("max_steps", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs"), RATES),
    **dict.fromkeys(("warmup_steps", "logging_steps"), RATES),
    **dict.fromkeys(("weight_decay", "optim", "adam_beta1", "adam_beta2", "adam_epsilon"), OPTIMIZER),
    **dict.fromkeys(("max_grad_norm", "seed", "bf16"), WEIGHTS),
    **dict.fromkeys(("save_strategy", "save_steps", "save_total_limit"), CHECKPOINTS),
    **dict.fromkeys(("load_best_model_at_end", "metric_for_best_model", "early_stopping_patience"), BEST),
}
"""Every allowed name, and the test that fails without its effect."""


def arguments_of(**changes):
    tree = {**TREE, "training_args": {**TREE["training_args"], **changes}}
    return validate_parameters(copy.deepcopy(tree)).training_args


def judged(**changes):
    """Both checks that stand before the first node of a training on a CPU."""
    tree = {**TREE, "device": "cpu", "training_args": {**TREE["training_args"], **changes}}
    parameters = validate_parameters(copy.deepcopy(tree))
    check_arguments(parameters)
    return parameters


@pytest.fixture
def trained(fit, monkeypatch):  # noqa: F811
    """`trained(max_steps=2)`: what was fitted, its loop, and the checkpoints that lay there at the end."""

    def go(**changes):
        arguments = arguments_of(**{**TRAINING, "logging_first_step": False, **changes})
        seen = {}
        run = TrainingLoop.run

        def look(loop, checkpoint):
            state = run(loop, checkpoint)
            seen["loop"] = loop
            seen["checkpoints"] = sorted(path.name for path in loop.folder.glob("checkpoint-*"))
            return state

        with monkeypatch.context() as patch:
            patch.setattr(TrainingLoop, "run", look)
            fitted = fit(training_args=arguments, resume="never")
        seen["weights"] = load_file(fitted.directory / "adapter_model.safetensors")
        return fitted, seen

    return go


def test_every_allowed_name_has_a_test_of_its_effect():
    assert set(EFFECTS) == set(TrainingParameters.model_fields)
    for place in EFFECTS.values():
        file, _, test = place.partition("::")
        assert f"def {test}(" in (TESTS / file).read_text(encoding="utf-8"), place


def test_rates_are_those_of_the_schedule_and_its_settings(trained):
    schedule = {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 2.0, "lr_end": 1e-4}}
    fitted, _ = trained(max_steps=3, learning_rate=1e-2, warmup_steps=1, logging_steps=1, **schedule)
    rates = [row["learning_rate"] for row in fitted.log if "loss" in row]
    # (rate - end) x (share that is left)^2 + end, after a first step from 0
    assert rates == pytest.approx([0.0, 1e-2, 9.9e-3 * 0.5**2 + 1e-4])


def test_a_rate_follows_the_validation_loss_down(trained):
    never_enough = {"patience": 0, "factor": 0.5, "threshold": 0.99}
    schedule = {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": never_enough, "warmup_steps": 0}
    fitted, _ = trained(max_steps=4, learning_rate=1e-3, eval_strategy="steps", eval_steps=1, **schedule)
    assert [row["learning_rate"] for row in fitted.log] == pytest.approx([1e-3, 1e-3, 5e-4, 2.5e-4])


def test_the_optimizer_has_the_values_that_were_asked_for(trained):
    asked = {"adam_beta1": 0.5, "adam_beta2": 0.9, "adam_epsilon": 1e-3, "weight_decay": 0.1}
    _, seen = trained(max_steps=1, optim="adamw_torch", **asked)
    decayed, kept = seen["loop"].optimizer.param_groups
    assert (decayed["betas"], decayed["eps"], decayed["weight_decay"]) == ((0.5, 0.9), 1e-3, 0.1)
    assert not decayed["fused"]
    assert not kept["params"]
    _, seen = trained(max_steps=1, optim="adafactor")
    assert type(seen["loop"].optimizer.optimizer).__name__ == "Adafactor"
    _, seen = trained(max_steps=1)
    assert seen["loop"].optimizer.param_groups[0]["fused"]


def test_plain_gradient_descent_takes_steps_in_proportion_to_the_gradient(trained):
    usual = {"max_steps": 1, "warmup_steps": 0, "optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0}
    once, twice = (trained(learning_rate=rate, **usual)[1]["weights"] for rate in (1e-3, 2e-3))
    moved = [name for name in once if "lora_B" in name and once[name].any()]
    assert moved
    for name in moved:  # lora_B starts at 0
        torch.testing.assert_close(twice[name], 2 * once[name], rtol=1e-5, atol=0)


def test_a_rate_that_vanishes_publishes_the_weights_that_the_training_began_with(fit):  # noqa: F811
    plain = {"max_steps": 1, "warmup_steps": 0, "optim": "sgd", "lr_scheduler_type": "constant", "learning_rate": 1e-30}
    lora = yaml.safe_load(PARAMETERS.read_text(encoding="utf-8"))["lora"]
    lora = LoraParameters(**{**lora, "init_lora_weights": False})
    fitted = fit(lora=lora, training_args=arguments_of(**{**TRAINING, **plain}), resume="never")
    assert "was too low to change" in fitted.summary["warning"]


def test_a_value_changes_the_weights_that_are_trained(trained):
    usual = {"max_steps": 2, "warmup_steps": 0, "adam_epsilon": 1.0}  # AdamW does not see a gradient's scale otherwise
    plain = trained(**usual)[1]["weights"]
    for changes in ({"max_grad_norm": 1e-3}, {"seed": 7}, {"bf16": True}):
        changed = trained(**usual, **changes)[1]["weights"]
        assert any(not torch.equal(changed[name], plain[name]) for name in plain), changes


def test_steps_logs_and_validations_are_those_that_were_asked_for(trained, monkeypatch):
    from qwen_vl_lora.training import loop as training

    sizes = []
    pack = training.pack_rows
    monkeypatch.setattr(training, "pack_rows", lambda rows, size, most: (sizes.append(size), pack(rows, size, most))[1])
    cut = {"num_train_epochs": 2, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    validated = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 3}
    fitted, _ = trained(**cut, **validated, logging_strategy="epoch", logging_first_step=True)
    assert fitted.summary["steps"] == 4  # 4 captions, 2 a step, twice
    assert [row["step"] for row in fitted.log if "loss" in row] == [1, 2, 4]
    assert [row["step"] for row in fitted.log if "validation_loss" in row] == [1, 2, 3, 4]
    assert set(sizes) == {3}


def test_checkpoints_are_written_and_kept_as_asked_for(trained):
    def kept(**asked):
        return trained(max_steps=5, **asked)[1]["checkpoints"]

    assert kept(save_steps=2, save_total_limit=None) == ["checkpoint-2", "checkpoint-4", "checkpoint-5"]
    assert kept(save_steps=2, save_total_limit=1) == ["checkpoint-5"]
    assert kept(save_strategy="epoch", save_total_limit=None) == ["checkpoint-4", "checkpoint-5"]
    assert kept(save_strategy="no") == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"load_best_model_at_end": True},
            r"got save_strategy `steps` and eval_strategy `epoch`\. Set save_strategy: epoch",
        ),
        (
            {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 4},
            "save_steps must equal eval_steps; got save_steps 4 and eval_steps 2",
        ),
        (
            {"early_stopping_patience": 2},
            "needs load_best_model_at_end: true, with save_strategy equal to eval_strategy",
        ),
        ({"save_strategy": "best"}, r"training_args\.save_strategy: `best` is not supported"),
        (
            {"metric_for_best_model": "cider"},
            r"training_args\.metric_for_best_model: .*'loss' or 'eval_loss'; got 'cider'",
        ),
        ({"metric_for_best_model": "loss"}, "metric_for_best_model needs load_best_model_at_end"),
        ({"optim": "adamw_fast"}, r"training_args\.optim: .*'adamw_fast'; nearest: adamw_torch"),
        ({"optim": "paged_adamw_8bit"}, r"training_args\.optim: .*'paged_adamw_8bit'"),
        ({"optim": "adafactor", "adam_beta2": 0.9}, "`adafactor` does not use adam_beta2"),
        ({"optim": "sgd", "adam_beta1": 0.9}, "`sgd` does not use adam_beta1"),
        ({"lr_scheduler_type": "cosin"}, r"training_args\.lr_scheduler_type: .*nearest: cosine\."),
        ({"lr_scheduler_kwargs": {"num_cycle": 2}}, "unknown name 'num_cycle'; nearest: num_cycles"),
        ({"lr_scheduler_kwargs": {"num_cycles": "many"}}, "lr_scheduler_type `cosine`: .*cannot be used"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "`warmup_stable_decay`: .*'num_decay_steps'"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "min_lr or min_lr_rate should be set"),
        ({"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": -1}}, "negative power"),
        ({"lr_scheduler_type": "polynomial", "max_steps": 8}, "in 8 steps, 8 of them warm-up: .*division by zero"),
        ({"lr_scheduler_type": "constant"}, "use constant_with_warmup, or set warmup_steps: 0"),
        (
            {"lr_scheduler_type": "constant", "warmup_steps": 0, "lr_scheduler_kwargs": {"a": 1}},
            "takes no lr_scheduler_kwargs",
        ),
        (
            {"lr_scheduler_type": "reduce_lr_on_plateau", "warmup_steps": 0, "eval_strategy": "no"},
            "needs a validation loss; set eval_strategy",
        ),
        (
            {"lr_scheduler_type": "reduce_lr_on_plateau", "warmup_steps": 0, "lr_scheduler_kwargs": {"patience": "x"}},
            "lr_scheduler_kwargs, for lr_scheduler_type `reduce_lr_on_plateau`",
        ),
        ({"max_steps": 0}, r"training_args\.max_steps: expected -1.* or at least 1; got 0"),
        ({"warmup_steps": 2.5}, "expected whole optimizer steps, or below 1 a share"),
        ({"eval_steps": 5}, "eval_steps is 5, but eval_strategy is `epoch`"),
        ({"seed": 2**32}, r"training_args\.seed: .*less than 4294967296"),
        ({"adam_epsilon": 0.0}, r"training_args\.adam_epsilon"),
        ({"fp16": True}, "float16 is for GPUs"),
        (
            {"eval_strategy": False},
            'training_args.eval_strategy: YAML reads an unquoted no as false.*write "no" in quotes',
        ),
        ({"save_strategy": False}, "training_args.save_strategy: YAML reads an unquoted no as false"),
        ({"logging_strategy": False}, "training_log and its curves need the loss"),
        ({"tf32": True}, r"training_args\.tf32: not supported"),
        ({"eval_on_start": True}, r"training_args\.eval_on_start: not supported"),
        ({"log_level": "loud"}, r"training_args\.log_level: set by the project: .*KEDRO_LOGGING_CONFIG"),
        ({"accelerator_config": {"split_batches": True}}, r"training_args\.accelerator_config: set by the project"),
        ({"parallelism_config": {}}, r"training_args\.parallelism_config: not supported: use `cluster`"),
        ({"dataloader_prefetch_factor": 2}, r"training_args\.dataloader_prefetch_factor: set by the project"),
        ({"greater_is_better": True}, "its lowest value is the best"),
        ({"save_on_each_node": True}, "all machines share one workspace"),
        ({"warmup_ratio": 0.05}, r"training_args\.warmup_ratio: .*warmup_steps: 0\.05"),
        ({"group_by_length": True}, "rows of one step are sorted by length"),
        ({"overwrite_output_dir": True}, "every run writes a new version"),
        ({"no_cuda": True}, "use `device`"),
        ({"evaluation_strategy": "no"}, "use eval_strategy"),
        ({"tokenizer": "x"}, "the processor is that of the base model"),
        ({"max_seq_length": 512}, "use the top-level key max_length"),
        ({"adafactor": True}, "use optim: adafactor"),
    ],
)
def test_what_training_would_refuse_or_leave_aside_is_refused_before_it(changes, message):
    with pytest.raises(ParameterError, match=message):
        judged(**changes)


def test_every_schedule_that_is_allowed_can_be_used():
    needed = {
        "cosine_with_min_lr": {"min_lr_rate": 0.1},
        "cosine_warmup_with_min_lr": {"min_lr": 1e-6, "warmup_lr_rate": 0.1},
        "warmup_stable_decay": {"num_decay_steps": 5, "decay_type": "1-sqrt"},
        "cosine_with_restarts": {"num_cycles": 2},
        "inverse_sqrt": {"timescale": 100},
        "reduce_lr_on_plateau": {"factor": 0.5, "patience": 1},
    }
    allowed = TrainingParameters.model_fields["lr_scheduler_type"].annotation.__args__
    for kind in allowed:
        steps = 0 if kind in ("constant", "reduce_lr_on_plateau") else 2
        judged(lr_scheduler_type=kind, lr_scheduler_kwargs=needed.get(kind), warmup_steps=steps)
    assert set(needed) < set(allowed)


def test_a_schedule_is_tried_with_the_steps_that_training_has():
    arguments = training_arguments(judged(lr_scheduler_type="polynomial", warmup_steps=6))
    check_schedule(arguments, 8)
    with pytest.raises(ParameterError, match="in 6 steps, 6 of them warm-up"):
        check_schedule(arguments, 6)


def test_every_name_but_those_that_the_loop_implements_reaches_transformers():
    given = judged(adam_beta2=0.97, weight_decay=0.25, max_grad_norm=0.5, warmup_steps=3)
    passed = training_arguments(given)
    here = {"per_device_train_batch_size", "early_stopping_patience", "gradient_checkpointing", "fsdp"}
    for name in given.training_args.model_dump().keys() - here:
        assert getattr(passed, name) == getattr(given.training_args, name), name


def test_what_may_be_left_out_is_not_recorded_where_it_was():
    assert set(arguments_of().model_dump()) == set(TREE["training_args"])
    given = arguments_of(adam_beta2=0.99, optim=None)
    assert set(given.model_dump()) == {*TREE["training_args"], "adam_beta2"}


ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 40),
    st.floats(allow_nan=True, width=32),
    st.sampled_from(["no", "steps", "epoch", "auto", "loss", "adamw_torch", "polynomial", "linear", "fused", "1", ""]),
    st.dictionaries(st.sampled_from(["power", "num_cycles", "min_lr", "x"]), st.integers(-2, 3), max_size=2),
    st.lists(st.integers(0, 3), max_size=2),
)
NAMES = sorted(library_names(*TrainingParameters.source) | set(TrainingParameters.model_fields))


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.dictionaries(st.sampled_from(NAMES), ANYTHING, min_size=1, max_size=3))
def test_whatever_is_said_is_passed_on_or_refused_by_its_name(changes):
    """Over all names of the installed TrainingArguments."""
    try:
        arguments = judged(**changes).training_args
    except ParameterError as error:
        said = str(error)
        assert any(re.search(rf"\b{name}\b", said) for name in changes), said
        assert "Traceback" not in said
    else:
        assert set(changes) <= set(TrainingParameters.model_fields)
        for name, value in changes.items():
            dumped = arguments.model_dump().get(name)
            assert dumped == value or (isinstance(value, float) and math.isclose(dumped, value)), name


@pytest.mark.parametrize("name", sorted(library_names(*TrainingParameters.source)))
def test_every_name_of_training_arguments_is_a_typed_field_or_refused_with_a_reason(name):
    if name in TrainingParameters.model_fields:
        assert name not in TrainingParameters.refused
        return
    with pytest.raises(ParameterError, match=rf"training_args\.{name}: \S+ \S+ \S+") as refused:
        arguments_of(**{name: True})
    assert TrainingParameters.refused[name] in str(refused.value)


def test_a_name_that_only_a_newer_transformers_has_is_refused():
    reason = type("Newer", (TrainingParameters,), {"refused": {}}).why_refused("tf32")
    assert reason == ("a name of TrainingArguments that is not supported here: its effect was never tested; remove it")


def test_a_name_that_transformers_removed_is_not_one_that_it_has():
    assert not set(TrainingParameters.removed) & set(NAMES)


@pytest.fixture
def gpu_without_bfloat16(monkeypatch):
    """As an RTX 2080 or a T4 answers: emulated only."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    return torch.device("cuda", 0)


def half_precision(**lora):
    tree = {**TREE, "lora": {**TREE["lora"], **lora}, "training_args": {**TREE["training_args"], "bf16": True}}
    return validate_parameters(copy.deepcopy(tree))


def test_a_gpu_without_bfloat16_trains_in_float16(gpu_without_bfloat16):
    asked = half_precision()
    usable = usable_settings(asked, gpu_without_bfloat16, 1)
    arguments = usable.training_args
    assert (arguments.bf16, arguments.fp16, arguments.dtype) == (False, True, "float16")
    same = arguments.model_copy(update={"bf16": True, "fp16": False})
    assert usable.model_copy(update={"training_args": same}) == asked
    assert usable_settings(asked, torch.device("cpu"), 1) == asked


def test_a_gpu_without_bfloat16_refuses_to_train_biases(gpu_without_bfloat16):
    with pytest.raises(DeviceError, match=r"this GPU has no bfloat16.*Set lora\.bias: none"):
        usable_settings(half_precision(bias="lora_only"), gpu_without_bfloat16, 1)
