"""`make verify-recipe` compares what can be derived, and its numbers are those of a run."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from benchmarks.verify_recipe import trainable_parameters

from hub.loopback import MODEL, add_coco, files_of, hub, hub_environment  # noqa: F401
from hub.test_recipes import ON_A_CPU, PROJECT, Machine
from samples.pictures import jpeg

QWEN2_VL_2B = {
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "num_hidden_layers": 28,
}
"""From the model's published config.json."""

LORA = {
    "r": 64,
    "bias": "none",
    "use_dora": False,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}


def test_loras_parameters_follow_from_the_shape_of_the_base():
    attention = 2 * 64 * (1536 + 1536) + 2 * 64 * (1536 + 256)
    assert trainable_parameters(QWEN2_VL_2B, LORA) == 28 * (attention + 3 * 64 * (1536 + 8960)) == 73_859_072
    assert trainable_parameters(QWEN2_VL_2B, LORA | {"target_modules": ".*q_proj"}) is None


@pytest.mark.slow
def test_a_run_is_compared_with_what_it_should_be(hub, tmp_path, base_path):  # noqa: F811
    hub.add_model(MODEL, files_of(base_path("qwen2_vl")))
    add_coco(hub, [jpeg(seed) for seed in range(20)])
    machine = Machine(tmp_path, hub_environment(hub, tmp_path) | {"PYTHONPATH": str(PROJECT)})
    command = [sys.executable, "-m", "benchmarks.verify_recipe", "--env", "qwen2_vl_2b_coco", "--params", ON_A_CPU]
    environment = os.environ | machine.environment
    child = subprocess.run(
        command, cwd=machine.project, env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    verdicts = child.stdout.splitlines()
    assert any(line.startswith("ok     image tokens of a training row: 100") for line in verdicts), child.stderr
    assert any(line.startswith("ok     optimizer steps: 2 ") for line in verdicts)
    assert any(line.startswith("ok     trainable parameters") for line in verdicts)
    assert "DIFFERS training and test samples: (16, 4) (expected (496, 4))" in child.stdout  # 20 rows are not COCO
    assert child.returncode == 1
