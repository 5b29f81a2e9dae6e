"""A run computes where and as precisely as it was asked to, or says what it did instead."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from cluster.processes import wait_until
from qwen_vl_lora.exceptions import DeviceError
from qwen_vl_lora.model import devices
from qwen_vl_lora.model.devices import check_attention, choose_device, usable_dtype

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def gpu_without_bfloat16(monkeypatch):
    """As an RTX 2080 or a T4 answers: emulated only."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    devices._say_once.cache_clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_named_with_what_to_do():
    assert choose_device("auto") == choose_device("cpu") == CPU
    with pytest.raises(DeviceError, match=r"sees no CUDA device here.*device=cpu"):
        choose_device("cuda")


def test_a_gpu_without_bfloat16_computes_in_float16_and_says_so_once(gpu_without_bfloat16, caplog):
    assert [usable_dtype("bfloat16", GPU) for _ in range(2)] == ["float16", "float16"]
    assert [record.getMessage() for record in caplog.records] == [
        "This GPU has no bfloat16 (cuda:0): computing in float16, which changes results slightly."
    ]


def test_what_was_not_asked_in_bfloat16_stays(gpu_without_bfloat16):
    assert [usable_dtype(name, GPU) for name in ("float32", "float16")] == ["float32", "float16"]
    assert usable_dtype("bfloat16", CPU) == "bfloat16"


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="flash-attn is installed")
def test_an_attention_that_is_not_installed_is_named_before_the_weights_load():
    check_attention("sdpa")
    with pytest.raises(DeviceError, match=r"flash-attn is not installed.*attention: sdpa"):
        check_attention("flash_attention_2")


@pytest.fixture
def before_torch(monkeypatch):
    """A process that has not imported torch, and whose environment does not say how threads wait."""
    monkeypatch.setenv("OMP_WAIT_POLICY", "to be restored")
    monkeypatch.delenv("OMP_WAIT_POLICY")
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr(devices, "_waiting_is_ours", False)


@pytest.mark.parametrize(("idle", "waiting"), [(20, None), (18, None), (17, "PASSIVE"), (0, "PASSIVE")])
def test_threads_wait_in_a_busy_loop_where_nothing_else_computes(before_torch, monkeypatch, idle, waiting):
    looks = iter([[5, 0, 3, 90, 0, 0, 0, 0, 0, 0], [25 - idle, 0, 3, 90 + idle, 0, 0, 0, 0, 0, 0]])
    monkeypatch.setattr(devices, "_ticks", lambda: next(looks))
    devices.wait_passively()
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    devices.wait_as_suits_the_cores()
    assert os.environ.get("OMP_WAIT_POLICY") == waiting


@pytest.mark.parametrize("given", ["PASSIVE", "ACTIVE"])
def test_how_threads_wait_can_be_said_in_the_environment(before_torch, monkeypatch, given):
    monkeypatch.setenv("OMP_WAIT_POLICY", given)
    monkeypatch.setattr(devices, "_cores_are_idle", lambda: given == "PASSIVE")
    devices.wait_passively()
    devices.wait_as_suits_the_cores()
    assert os.environ["OMP_WAIT_POLICY"] == given


def test_busy_cores_are_not_idle():
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    try:
        assert wait_until(lambda: not devices._cores_are_idle(), 20)
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()
