"""Pre-training scores answers only, learns, and goes on after a kill as if nothing had happened."""

from __future__ import annotations

import functools
import logging
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2VLProcessor

from qwen_vl_lora.tiny import pretraining
from qwen_vl_lora.tiny.dialogue import Conversation, Exchange, random_conversation
from qwen_vl_lora.tiny.drawing import random_scene
from qwen_vl_lora.tiny.pretraining import (
    IGNORE_INDEX,
    PretrainingRecipe,
    Stage,
    collate,
    learning_rate,
    pretrain,
)
from qwen_vl_lora.tiny.tiny_model import TinySizes, build_processor

SMALL = TinySizes(hidden=64, intermediate=64, layers=1, heads=2, vision_width=64, vision_depth=1, vision_heads=2)


def stage(steps: int, **changes: Any) -> Stage:
    settings = {"batch_size": 4, "learning_rate": 2e-3, "warmup_steps": 2, "cooldown_steps": 2}
    return Stage(steps=steps, **(settings | changes))


def recipe(tower_steps: int = 4, language_steps: int = 8, **changes: Any) -> PretrainingRecipe:
    return PretrainingRecipe(
        tower=stage(tower_steps), language=stage(language_steps), **({"block_batches": 3, "sizes": SMALL} | changes)
    )


build_once = functools.cache(build_processor)


@pytest.fixture(scope="module")
def processor() -> Qwen2VLProcessor:
    return build_once(seed=0)


@pytest.fixture(autouse=True)
def one_vocabulary_for_a_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training it takes longer than the rest of these trainings."""
    monkeypatch.setattr(pretraining, "build_processor", lambda seed: build_once(seed=seed))


@pytest.fixture(autouse=True)
def restore_random_state() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> torch.nn.Module:
    """What a run gives that nobody kills."""
    with torch.random.fork_rng(devices=[]):
        return pretrain(recipe(tower_steps=8), tmp_path_factory.mktemp("whole"))[0]


def scored_text(conversations: list[Conversation], processor: Qwen2VLProcessor) -> list[str]:
    labels = collate(conversations, processor).labels
    return [processor.tokenizer.decode(row[row != IGNORE_INDEX]) for row in labels]


def test_answers_and_their_end_token_are_scored_and_nothing_else(processor: Qwen2VLProcessor) -> None:
    scene = random_scene(random.Random(0))
    talk = (Exchange("Where?", "on the left", pictures=(scene,)), Exchange("Which?", "red"))
    single = (Exchange("Hello!", "You are welcome."),)
    assert scored_text([talk, single], processor) == [
        "on the left<|im_end|>red<|im_end|>",
        "You are welcome.<|im_end|>",
    ]


def test_a_label_is_the_token_that_follows(processor: Qwen2VLProcessor) -> None:
    batch = collate([random_conversation(random.Random(seed)) for seed in range(8)], processor)
    scored = batch.labels[:, :-1] != IGNORE_INDEX
    assert torch.equal(batch.labels[:, :-1][scored], batch.inputs["input_ids"][:, 1:][scored])


def test_picture_stands_before_or_after_the_question(processor: Qwen2VLProcessor) -> None:
    scene = random_scene(random.Random(0))
    for pictures_first, expected in ((True, "<|vision_end|>Where?"), (False, "Where?<|vision_start|>")):
        talk = (Exchange("Where?", "red", pictures=(scene,), pictures_first=pictures_first),)
        text = processor.tokenizer.decode(collate([talk], processor).inputs["input_ids"][0])
        assert expected in text


def test_learning_rate_rises_stays_and_falls_to_nothing() -> None:
    plan = stage(100, warmup_steps=10, cooldown_steps=20, learning_rate=1.0)
    rates = [learning_rate(plan, step) for step in range(100)]
    assert rates[:10] == pytest.approx([step / 10 for step in range(1, 11)])
    assert set(rates[9:81]) == {1.0}
    assert rates[80:] == pytest.approx([step / 20 for step in range(20, 0, -1)])


def test_a_longer_stage_begins_as_a_shorter_one() -> None:
    short, long = stage(1_000, cooldown_steps=300), stage(2_000, cooldown_steps=300)
    assert all(learning_rate(short, step) == learning_rate(long, step) for step in range(701))


def test_both_stages_lower_their_loss(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger=pretraining.__name__)
    pretrain(recipe(tower_steps=30, language_steps=30), tmp_path, log_every=5)
    for name in ("tower", "language"):
        losses = [float(loss) for loss in re.findall(rf"{name} step \d+: loss ([\d.]+)", caplog.text)]
        assert losses[-1] < losses[0] - 1


def test_language_stage_leaves_the_tower_as_it_was(tmp_path: Path) -> None:
    short, _ = pretrain(recipe(language_steps=0), tmp_path / "tower only")
    whole, _ = pretrain(recipe(), tmp_path / "both")
    assert tensors_equal(short.model.visual, whole.model.visual)
    assert not tensors_equal(short.model.language_model, whole.model.language_model)


@pytest.mark.parametrize("stage_name", ["tower", "language"])
def test_a_killed_run_goes_on_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: torch.nn.Module, stage_name: str
) -> None:
    save = pretraining._Fitting._save

    def save_and_die(fitting: Any, stage: str, step: int, optimizer: torch.optim.Optimizer) -> None:
        save(fitting, stage, step, optimizer)
        if stage == stage_name:
            raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(pretraining._Fitting, "_save", save_and_die)
        with pytest.raises(KilledError):
            # Five steps in: within a block of three batches.
            pretrain(recipe(tower_steps=8), tmp_path / "killed", save_every=5)
    resumed, _ = pretrain(recipe(tower_steps=8), tmp_path / "killed")
    assert tensors_equal(whole, resumed)


def test_a_finished_run_is_not_trained_further(tmp_path: Path) -> None:
    first, _ = pretrain(recipe(), tmp_path)
    again, _ = pretrain(recipe(), tmp_path)
    assert tensors_equal(first, again)


def test_a_checkpoint_of_another_recipe_is_left_aside(tmp_path: Path) -> None:
    pretrain(recipe(seed=1), tmp_path)
    fresh, _ = pretrain(recipe(), tmp_path)
    expected, _ = pretrain(recipe(), tmp_path / "new")
    assert tensors_equal(fresh, expected)


class KilledError(Exception):
    """Stands for a kill right after a checkpoint."""


def tensors_equal(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
