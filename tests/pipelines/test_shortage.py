"""Memory that runs out in training is answered with this training's figures, and nothing half-done is left."""

import pytest
import torch

from qwen_vl_lora.exceptions import MachineError
from qwen_vl_lora.training.loop import TrainingLoop

CUDA = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.64 GiB of which 1.20 GiB is "
    "free. Of the allocated memory 21.01 GiB is allocated by PyTorch. If reserved but unallocated memory is large try …"
)


def of_the_gpu(*arguments):
    """In torch's own words; no GPU raised it here."""
    raise torch.OutOfMemoryError(CUDA)


def of_the_cpu(*arguments):
    """For real."""
    torch.empty(10**14)


@pytest.mark.parametrize(
    ("runs_out", "said"), [(of_the_gpu, r"Tried to allocate 2.00 GiB.*1.20 GiB is free"), (of_the_cpu, "363.8 TiB")]
)
def test_figures_and_what_to_change_are_told(run, newest, project, monkeypatch, runs_out, said):
    run("data_engineering")
    monkeypatch.setattr(TrainingLoop, "compute_gradients", runs_out)
    figures = r"holds 4 captions, \d+ tokens, .* GPU needs about [\d.]+ MiB in all"
    changes = r"gradient_checkpointing: true: [\d.]+ MiB; .*batch_size: 2, gradient_accumulation_steps: 2: .*nf4"
    with pytest.raises(MachineError, match=f"{said}.*{figures}.*{changes}"):
        run("training")
    assert not (project / "data/06_models/tiny/adapter").exists()


def test_other_errors_pass_as_they_are(run, monkeypatch):
    def fails(*arguments):
        raise RuntimeError("shape mismatch")

    run("data_engineering")
    monkeypatch.setattr(TrainingLoop, "compute_gradients", fails)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        run("training")
