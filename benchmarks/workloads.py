"""The workloads of `make bench`: what is done, how often, and which figure is to be reached."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

Kind = Literal["train", "caption", "engineer", "startup"]

LORA = {
    "r": 64,
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "bias": "none",
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "use_rslora": False,
    "use_dora": False,
}
"""The tutorials' adapter."""

TRAINING = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 4,
    "learning_rate": 1e-4,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "bf16": False,
    "fp16": False,
    "seed": 42,
    "logging_steps": 10,
    "logging_first_step": True,
    "eval_strategy": "no",
    "save_strategy": "steps",
    "save_steps": 100,
    "save_total_limit": None,
    "load_best_model_at_end": False,
    "early_stopping_patience": None,
}
"""The tutorials' training arguments; what they leave out has transformers' defaults."""


@dataclass(frozen=True)
class Workload:
    """One line of the table.

    Attributes:
        key: name in the results.
        kind: which task both sides carry out.
        base: tiny, replica, toy, or for a GPU 2b and 7b.
        images: pictures, each with `captions` captions.
        side: px of a picture at the model's door.
        repeats: pairs of runs, one of each side in turn; 0: measured with `--long` alone, or by name.
        pairs: the same with `--long`, where it is more.
        seconds: what one pair of runs takes on 2 quiet cores, with its preparation and checks.
        min_ratio: target of baseline seconds / project seconds.
        max_ratio: target of project seconds / baseline seconds, where the project does more than the baseline.
        max_memory: target of project peak / baseline peak.
        tolerance: allowed relative difference of the validation losses.
    """

    key: str
    kind: Kind
    base: str = "replica"
    images: int = 96
    captions: int = 1
    epochs: int = 2
    checkpointing: bool = False
    side: int = 280
    repeats: int = 1
    pairs: int = 1
    seconds: int = 60
    min_ratio: float | None = None
    max_ratio: float | None = None
    max_memory: float | None = None
    tolerance: float = 0.005
    learning_rate: float = 1e-4
    batch_size: int = 4
    max_new_tokens: int = 128
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: Literal["cpu", "cuda"] = "cpu"
    storage: Literal["copy", "reference"] = "copy"

    @property
    def parameters(self) -> dict[str, Any]:
        """What differs from conf/base: the same for both sides."""
        image: dict[str, Any] = {"resized_height": self.side, "resized_width": self.side, "storage": self.storage}
        image |= {"min_pixels": None, "max_pixels": None}
        training = {
            **TRAINING,
            "per_device_train_batch_size": self.batch_size,
            "learning_rate": self.learning_rate,
            "num_train_epochs": self.epochs,
            "gradient_checkpointing": self.checkpointing,
            "bf16": self.dtype == "bfloat16",
        }
        # The tutorials' test set is the last four rows; validation is measured by the judge.
        split = {"test_images": 4, "validation_images": 0}
        return {
            "image": image,
            "max_length": 8192,
            "split": split,
            "lora": LORA,
            "training_args": training,
            "vision": "frozen",
            "rows": "shared",
            "resume": "never",
            "device": self.device,
            "generation": {"max_new_tokens": self.max_new_tokens, "repetition_penalty": 1.0, "batch_size": 32},
        }

    def times(self, *, is_long: bool) -> int:
        """Pairs of runs of one bench."""
        return max(self.repeats, self.pairs) if is_long else self.repeats

    def toy(self) -> Workload:
        """The same task at a size that takes seconds: for tests, and to see that everything runs."""
        changes: dict[str, Any] = {
            "base": "toy",
            "side": 56,
            "repeats": 1,
            "pairs": 1,
            "epochs": 1,
            "max_new_tokens": 4,
        }
        return replace(self, images=40 if self.kind == "engineer" else 8, **changes)


_CHECKPOINTED: dict[str, Any] = {"checkpointing": True}
_CAPTIONS_5: dict[str, Any] = {"captions": 5, "min_ratio": 9.5, "tolerance": 0.02}
_IN_PAIRS: dict[str, Any] = {"repeats": 0, "pairs": 5}

# The most telling first: a bench that is stopped has measured those.
WORKLOADS = (
    Workload("S", "startup", repeats=5, seconds=3, max_ratio=1.4),
    Workload("D_2000", "engineer", images=2_000, repeats=3, seconds=20, min_ratio=2.2),
    Workload("D_2000_reference", "engineer", images=2_000, repeats=3, seconds=20, min_ratio=3, storage="reference"),
    Workload("W0", "train", base="tiny", images=496, checkpointing=True, seconds=340, min_ratio=8, max_memory=0.31),
    Workload("W1_2ep", "train", pairs=5, seconds=170, min_ratio=2.7, max_memory=0.8),
    # At the size, learning rate and batch of the embedded default, so that captions end by themselves.
    Workload(
        "E",
        "caption",
        base="tiny",
        images=64,
        side=112,
        learning_rate=3e-3,
        batch_size=16,
        repeats=3,
        seconds=35,
        min_ratio=5,
    ),
    # Random weights never end a caption: both sides write exactly 32 tokens.
    Workload("E_replica", "caption", images=64, epochs=1, max_new_tokens=32, seconds=130, min_ratio=5),
    Workload("W2", "train", seconds=600, **_CAPTIONS_5),
    Workload("D_20000", "engineer", images=20_000, repeats=0, seconds=190, min_ratio=2),
    Workload("W1_2ep_ckpt", "train", seconds=210, min_ratio=2.5, max_memory=0.8, **_IN_PAIRS, **_CHECKPOINTED),
    Workload("W1_5ep", "train", epochs=5, seconds=350, min_ratio=3, **_IN_PAIRS),
    Workload("W1_5ep_ckpt", "train", epochs=5, seconds=490, min_ratio=3, **_IN_PAIRS, **_CHECKPOINTED),
    Workload("W2_ckpt", "train", repeats=0, seconds=800, **_CAPTIONS_5, **_CHECKPOINTED),
)

D_GROWTH_MB = 50
"""Largest growth of the project's peak memory from 2,000 to 20,000 images."""


def choose(only: str | None) -> list[Workload]:
    """Workloads by exact key or by the part before the first underscore: `W1` is all four of W1.

    Raises:
        ValueError: for a name that fits none.
    """
    if only is None:
        return list(WORKLOADS)
    chosen = []
    for name in only.split(","):
        exact = [workload for workload in WORKLOADS if workload.key == name]
        found = [workload for workload in WORKLOADS if workload.key.partition("_")[0] == name]
        if not (exact or found):
            raise ValueError(f"No workload {name!r}; there are {', '.join(workload.key for workload in WORKLOADS)}.")
        # W2 alone means both of W2; W1_2ep means itself.
        chosen += found or exact
    return chosen
