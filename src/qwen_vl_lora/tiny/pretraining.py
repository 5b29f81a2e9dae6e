"""Pre-training of the tiny base: the vision tower first, then the language model over the frozen tower.

Every step has new scenes, and only the answers of conversations are scored. The data of a step
depend only on the seed and the step's number, so a killed run resumes exactly, and two runs on
one machine give the same weights.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import cross_entropy, kl_div

from qwen_vl_lora.model.families import QWEN2_VL
from qwen_vl_lora.model.families.family import IM_END, IM_START
from qwen_vl_lora.tiny.dialogue import Conversation, random_conversation
from qwen_vl_lora.tiny.drawing import BACKGROUNDS, COLOURS, SHAPES, SIZES, draw_picture
from qwen_vl_lora.tiny.grounding import PLACE_WORDS, word_targets
from qwen_vl_lora.tiny.partitions import Partition, draw_scenes
from qwen_vl_lora.tiny.tiny_model import TinySizes, build_model, build_processor

if TYPE_CHECKING:
    from transformers import Qwen2VLForConditionalGeneration, Qwen2VLProcessor

log = logging.getLogger(__name__)

IGNORE_INDEX = -100

Losses = Callable[[int], Iterator[torch.Tensor]]
"""First step → lazily computed losses of that step and the following ones."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage's optimizer steps.

    Attributes:
        batch_size: pictures or conversations per step.
        learning_rate: of the plateau between a linear warm-up and a linear cool-down to zero. A longer
            run has the same first steps.
    """

    steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int
    cooldown_steps: int


@dataclass(frozen=True, slots=True)
class PretrainingRecipe:
    """The fixed recipe of the shipped base. It is not a parameter, because another recipe is another base.

    Attributes:
        tower: the stage in which image tokens learn the words for what they cover.
        language: the stage in which the language model learns to answer.
        block_batches: batches whose conversations are drawn together and sorted by length.
        two_object_steps: first language steps, which have scenes of two objects only.
        betas, weight_decay: of AdamW.
        clip_norm: largest norm of the gradient.
    """

    tower: Stage = Stage(steps=1_000, batch_size=64, learning_rate=2e-3, warmup_steps=50, cooldown_steps=600)
    language: Stage = Stage(steps=2_400, batch_size=32, learning_rate=2e-3, warmup_steps=200, cooldown_steps=800)
    block_batches: int = 8
    two_object_steps: int = 304
    weight_decay: float = 0.02
    betas: tuple[float, float] = (0.9, 0.98)
    clip_norm: float = 1.0
    seed: int = 20261121
    sizes: TinySizes = field(default_factory=TinySizes)


SHIPPED_RECIPE = PretrainingRecipe()


@dataclass(frozen=True, slots=True)
class Batch:
    """The batch of one language step.

    Attributes:
        inputs: the model's arguments; `input_ids` (B, T).
        labels: (B, T), the token to predict at each position, or -100.
    """

    inputs: dict[str, torch.Tensor]
    labels: torch.Tensor


def pretrain(
    recipe: PretrainingRecipe, directory: Path, log_every: int = 50, save_every: int = 250
) -> tuple[Qwen2VLForConditionalGeneration, Qwen2VLProcessor]:
    """Train from scratch or from the checkpoint in `directory`, and return the trained parts."""
    processor = build_processor(recipe.seed)
    model = build_model(recipe.sizes, processor.tokenizer, recipe.seed).train()
    fitting = _Fitting(recipe, model, directory / "checkpoint.pt", log_every, save_every)
    tower = QWEN2_VL.tower_of(model)
    # The word embeddings, shared with the output layer, are trained with the tower: its tokens predict them.
    fitting.run("tower", [*tower.parameters(), model.lm_head.weight], _tower_losses(recipe, model, processor))
    tower.requires_grad_(requires_grad=False)
    language = list(QWEN2_VL.language_model_of(model).parameters())
    fitting.run("language", language, _answer_losses(recipe, model, processor))
    return model.eval(), processor


def learning_rate(stage: Stage, step: int) -> float:
    """The learning rate of a step: linear rise, plateau, linear fall to zero."""
    rise = (step + 1) / max(1, stage.warmup_steps)
    fall = (stage.steps - step) / max(1, stage.cooldown_steps)
    return stage.learning_rate * min(1.0, rise, fall)


@dataclass(frozen=True, slots=True)
class _Fitting:
    """The training loop and its checkpoint, for both stages."""

    recipe: PretrainingRecipe
    model: Qwen2VLForConditionalGeneration
    checkpoint: Path
    log_every: int
    save_every: int

    def run(self, name: str, parameters: list[torch.nn.Parameter], losses: Losses) -> None:
        """Fit `parameters` for the steps of the stage `name` that are not yet done."""
        stage: Stage = getattr(self.recipe, name)
        optimizer = torch.optim.AdamW(
            parameters, lr=0.0, betas=self.recipe.betas, weight_decay=self.recipe.weight_decay, fused=True
        )
        done = self._load(name, stage, optimizer)
        started, recent = time.monotonic(), []
        for step, loss in enumerate(losses(done), start=done):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(stage, step)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, self.recipe.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
            recent.append(loss.item())
            if (step + 1) % self.log_every == 0:
                seconds = (time.monotonic() - started) / (step + 1 - done)
                log.info("%s step %d: loss %.4f, %.3f s a step", name, step + 1, sum(recent) / len(recent), seconds)
                recent.clear()
            if (step + 1) % self.save_every == 0 or step + 1 == stage.steps:
                self._save(name, step + 1, optimizer)

    def _save(self, stage: str, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Write a new file and rename it, so that a kill in between loses nothing."""
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.checkpoint.with_suffix(".unfinished")
        state = {
            "recipe": asdict(self.recipe),
            "stage": stage,
            "step": step,
            "model": self.model.state_dict(),
            "optimizer": optimizer.state_dict(),
        }
        torch.save(state, unfinished)
        unfinished.replace(self.checkpoint)

    def _load(self, name: str, stage: Stage, optimizer: torch.optim.Optimizer) -> int:
        """Restore what the checkpoint holds and return how many steps of the stage are done.

        A checkpoint of another recipe is ignored; one of the later stage means that this stage is done.
        """
        if not self.checkpoint.exists():
            return 0
        state = torch.load(self.checkpoint, weights_only=True)
        if state["recipe"] != asdict(self.recipe):
            return 0
        self.model.load_state_dict(state["model"])
        if state["stage"] != name:
            return stage.steps if name == "tower" else 0
        optimizer.load_state_dict(state["optimizer"])
        steps: int = state["step"]
        return steps


def _tower_losses(
    recipe: PretrainingRecipe, model: Qwen2VLForConditionalGeneration, processor: Qwen2VLProcessor
) -> Losses:
    """Divergence of each image token's prediction from the words for what it covers; zero is perfect."""
    word_ids, tower = _word_ids(processor), QWEN2_VL.tower_of(model)

    def losses(first: int) -> Iterator[torch.Tensor]:
        for step in range(first, recipe.tower.steps):
            rng = random.Random(f"tower/{recipe.seed}/{step}")
            scenes = list(islice(draw_scenes(Partition.PRETRAINING, rng), recipe.tower.batch_size))
            pixels = processor.image_processor([draw_picture(scene) for scene in scenes], return_tensors="pt")
            tokens = tower(pixels["pixel_values"], grid_thw=pixels["image_grid_thw"]).pooler_output
            said = model.lm_head(tokens).log_softmax(dim=-1)
            yield kl_div(said, word_targets(scenes, word_ids, said.shape[-1]), reduction="batchmean")

    return losses


def _answer_losses(
    recipe: PretrainingRecipe, model: Qwen2VLForConditionalGeneration, processor: Qwen2VLProcessor
) -> Losses:
    """Mean cross entropy of the scored tokens."""

    def losses(first: int) -> Iterator[torch.Tensor]:
        for conversations in _conversations_by_step(recipe, first):
            batch = collate(conversations, processor)
            hidden = model.model(**batch.inputs, use_cache=False).last_hidden_state
            scored = batch.labels != IGNORE_INDEX
            yield cross_entropy(model.lm_head(hidden[scored]), batch.labels[scored])

    return losses


def _word_ids(processor: Qwen2VLProcessor) -> dict[str, int]:
    """Return the token of each attribute's and place's word as it stands within a sentence, a space before it."""
    words = [*BACKGROUNDS, *SIZES, *COLOURS, *SHAPES, *PLACE_WORDS]
    return {word: processor.tokenizer.convert_tokens_to_ids(f"\u0120{word}") for word in words}


def _conversations_by_step(recipe: PretrainingRecipe, first: int) -> Iterator[list[Conversation]]:
    """Yield the conversations of step `first` and the following ones; a block's follow from its number."""
    size, steps = recipe.language.batch_size, recipe.language.steps
    for block in range(first // recipe.block_batches, math.ceil(steps / recipe.block_batches)):
        rng = random.Random(f"language/{recipe.seed}/{block}")
        start = block * recipe.block_batches
        num_objects = 2 if start < recipe.two_object_steps else None
        drawn = [random_conversation(rng, num_objects) for _ in range(recipe.block_batches * size)]
        # Neighbours in length share a batch, so little of it is padding.
        drawn.sort(key=lambda talk: sum(len(turn.question) + len(turn.answer) for turn in talk))
        order = rng.sample(range(recipe.block_batches), recipe.block_batches)
        for step, position in enumerate(order, start=start):
            if first <= step < steps:
                yield drawn[position * size : (position + 1) * size]


def collate(conversations: list[Conversation], processor: Qwen2VLProcessor) -> Batch:
    """Draw the pictures, apply the chat format and mark each answer and its end token as scored."""
    texts = [processor.apply_chat_template(_messages(talk)) for talk in conversations]
    pictures = [draw_picture(scene) for talk in conversations for turn in talk for scene in turn.pictures]
    encoded = processor(text=texts, images=pictures, padding=True, padding_side="right", return_tensors="pt")
    labels = _next_answer_tokens(encoded["input_ids"], processor)
    # Causal attention and padding on the right: no scored position ever sees a padded one,
    # and attention without a mask is faster.
    inputs = {key: value for key, value in encoded.items() if key != "attention_mask"}
    return Batch(inputs=inputs, labels=labels)


def _messages(talk: Conversation) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    for turn in talk:
        pictures = [{"type": "image"}] * len(turn.pictures)
        text = [{"type": "text", "text": turn.question}]
        content = pictures + text if turn.pictures_first else text + pictures
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": turn.answer}]
    return messages


def _next_answer_tokens(input_ids: torch.Tensor, processor: Qwen2VLProcessor) -> torch.Tensor:
    """Return (B, T): the following token where that belongs to an answer or ends it, else -100."""
    start, assistant, end = processor.tokenizer.convert_tokens_to_ids([IM_START, "assistant", IM_END])
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    for row, tokens in enumerate(input_ids.tolist()):
        speaking = False
        for position in range(2, len(tokens) - 1):
            # An answer follows the three tokens `<|im_start|>assistant\n`.
            if tokens[position - 2] == start and tokens[position - 1] == assistant:
                speaking = True
            if speaking:
                labels[row, position] = tokens[position + 1]
                speaking = tokens[position + 1] != end
    return labels
