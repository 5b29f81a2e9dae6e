"""Weights that are sharded among two processes train what one process would, and go on exactly where they stopped."""

import pytest
import torch
import yaml
from safetensors.torch import load_file

from qwen_vl_lora.exceptions import ClusterError, DeviceError
from qwen_vl_lora.parameters import validate_parameters
from qwen_vl_lora.training import fit
from qwen_vl_lora.training.fit import usable_settings
from training import two_ranks
from training.two_ranks import FAULT, Job

FROZEN = {"vision": "frozen", "per_device_eval_batch_size": 2}  # three batches: the last leaves a rank without one


@pytest.fixture(scope="module")
def job(tmp_path_factory, base_path):
    return Job(tmp_path_factory.mktemp("job"), base_path("qwen2_vl"))


@pytest.fixture
def sharded(job, monkeypatch):
    """`sharded(workspace, **training)`: two CPU ranks, which the product refuses, make two passes in each step."""
    monkeypatch.setattr(fit, "train", two_ranks.sharding)
    monkeypatch.setattr(fit, "_check_sharding", lambda *_, is_float16: None)
    how = {"fsdp": True, "gradient_accumulation_steps": 2, **FROZEN}
    return lambda workspace, **training: job.train(workspace, 2, 1, **how, **training)


def weights(fitted):
    return load_file(fitted.directory / "adapter_model.safetensors")


def without_time(fitted):
    return [{name: value for name, value in row.items() if name != "samples_per_second"} for row in fitted.log]


def assert_close(one, two):
    theirs = weights(two)
    assert theirs.keys() == weights(one).keys()
    for name, value in weights(one).items():
        assert torch.allclose(theirs[name], value, rtol=1e-3, atol=1e-5), name
    for mine, other in zip(without_time(one), without_time(two), strict=True):
        assert other == pytest.approx(mine, rel=1e-4)


def test_two_ranks_with_half_the_weights_each_give_the_adapter_of_one_process(job, sharded):
    two = sharded("two")
    assert_close(job.train("one", 1, 4, **FROZEN), two)
    held = [float((job.folder / "two" / "training" / f"held-{rank}").read_text()) for rank in range(2)]
    assert held == pytest.approx([0.5, 0.5], abs=0.01)
    assert two.summary["trainable_parameters"] == sum(value.numel() for value in weights(two).values())


@pytest.mark.slow
def test_half_precision_and_recomputed_activations_train_as_one_process_does(job, sharded):
    training = {"bf16": True, "gradient_checkpointing": True, "max_steps": 2}
    one, two = job.train("one bf16", 1, 4, **FROZEN, **training), sharded("two bf16", **training)
    for mine, other in zip(without_time(one), without_time(two), strict=True):
        assert other == pytest.approx(mine, rel=0.02)


def test_the_best_step_is_published_from_its_shards(job, sharded):
    training = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "max_steps": 2}
    too_large = {"learning_rate": 0.05, "lr_scheduler_type": "constant"}  # the loss rises after the first step
    best = {"load_best_model_at_end": True, **too_large, **training}
    one, two = job.train("one best", 1, 4, **FROZEN, **best), sharded("two best", **best)
    assert (one.summary["best_step"], two.summary["best_step"]) == (1, 1)
    assert_close(one, two)


@pytest.mark.slow
def test_a_sharded_training_goes_on_to_the_same_bits(job, sharded, monkeypatch):
    undisturbed = sharded("undisturbed", dropout=0.1)
    monkeypatch.setenv(FAULT, "1:6:rank killed")
    with pytest.raises(ClusterError, match="Rank 1 of 2 was killed by SIGKILL"):
        sharded("killed", dropout=0.1)
    monkeypatch.delenv(FAULT)
    assert job.checkpoints("killed")[-1] == "checkpoint-4"
    fitted = sharded("killed", dropout=0.1)
    assert fitted.summary["resumed_from"] == "checkpoint-4"
    assert without_time(fitted) == without_time(undisturbed)
    theirs = weights(undisturbed)
    assert all(torch.equal(theirs[name], value) for name, value in weights(fitted).items())


CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.mark.parametrize(
    ("changes", "device", "ranks", "message"),
    [
        ({}, CPU, 2, "shards weights among GPUs, but this run is on a CPU"),
        ({}, CUDA, 1, "shards weights among processes, but there is only one"),
        ({"bf16": False, "fp16": True}, CUDA, 2, "was never tested in float16"),
    ],
)
def test_where_nothing_would_be_sharded_it_is_refused(changes, device, ranks, message):
    tree = yaml.safe_load(two_ranks.PARAMETERS.read_text(encoding="utf-8"))
    plain = validate_parameters({**tree, "training_args": {**tree["training_args"], **changes}})
    asked = plain.training_args.model_copy(update={"fsdp": True})
    with pytest.raises(DeviceError, match=message):
        usable_settings(plain.model_copy(update={"training_args": asked}), device, ranks)
    assert usable_settings(plain, device, ranks) == plain
