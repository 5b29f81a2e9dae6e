"""A run computes where and as precisely as it was asked to, or says what it did instead."""

import importlib.util

import pytest
import torch

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
