"""Captions from a model, greedily and in batches of similar length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from qwen_vl_lora.features.inputs import PictureInputs
from qwen_vl_lora.modeling.chat import EncodedConversation
from qwen_vl_lora.parameters import GenerationParameters
from qwen_vl_lora.ranks import here


def write_captions(
    model: Any,
    processor: Any,
    prompts: Sequence[EncodedConversation],
    pictures: PictureInputs,
    generation: GenerationParameters,
    description: str,
) -> list[str]:
    """One caption for each prompt, in the order of the prompts; ranks share the batches and all get all captions.

    Batches give the same captions as one prompt at a time: rows are padded on the left and
    padding is masked.

    Args:
        prompts: from `ChatEncoder.encode_prompt`.
        description: label of the progress bar.
    """
    from tqdm import tqdm

    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index].ids))
    batches = [order[start : start + generation.batch_size] for start in range(0, len(order), generation.batch_size)]
    captions: dict[int, str] = {}
    model.eval()
    quiet = None if here.is_first() else True
    with tqdm(total=len(prompts), desc=description, unit="caption", leave=False, disable=quiet) as bar:
        for number in here.share(len(batches)):
            here.note(f"{description}: batch {number + 1} of {len(batches)}")
            asked = [prompts[index] for index in batches[number]]
            captions.update(
                zip(batches[number], _write_batch(model, processor, asked, pictures, generation), strict=True)
            )
            bar.update(len(asked) * here.world_size())
    everyones = here.gather_texts(captions, f"{description}: joining")
    return [everyones[index] for index in range(len(prompts))]


def _write_batch(
    model: Any,
    processor: Any,
    prompts: Sequence[EncodedConversation],
    pictures: PictureInputs,
    generation: GenerationParameters,
) -> list[str]:
    from transformers import BatchFeature

    tokenizer = processor.tokenizer
    inputs = BatchFeature(batch_prompts(prompts, tokenizer.pad_token_id, pictures)).to(model.device)
    with torch.inference_mode():
        ids = model.generate(**inputs, **_greedy(model, tokenizer, generation))
    written = ids[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(written, skip_special_tokens=True)]


def batch_prompts(prompts: Sequence[EncodedConversation], pad_id: int, pictures: PictureInputs) -> dict[str, Any]:
    """Model inputs (B, T) for prompts, padded on the left."""
    width = max(len(prompt.ids) for prompt in prompts)
    ids = np.full((len(prompts), width), pad_id, dtype=np.int64)
    mask = np.zeros_like(ids)
    types = np.zeros_like(ids)
    for number, prompt in enumerate(prompts):
        left = width - len(prompt.ids)
        ids[number, left:], mask[number, left:], types[number, left:] = prompt.ids, 1, prompt.is_image
    grids = [grid for prompt in prompts for grid in prompt.grids]
    inputs: dict[str, Any] = {
        "input_ids": torch.from_numpy(ids),
        "attention_mask": torch.from_numpy(mask),
        "mm_token_type_ids": torch.from_numpy(types),
    }
    if grids:
        inputs["image_grid_thw"] = torch.tensor(grids)
    return {**inputs, **pictures([name for prompt in prompts for name in prompt.images])}


def _greedy(model: Any, tokenizer: Any, generation: GenerationParameters) -> dict[str, Any]:
    """Generation settings that are ours alone: the base's own generation_config samples."""
    from transformers import GenerationConfig

    ends = model.generation_config.eos_token_id
    config = GenerationConfig(
        max_new_tokens=generation.max_new_tokens,
        repetition_penalty=generation.repetition_penalty,
        do_sample=False,
        num_beams=1,
        eos_token_id=ends if ends is not None else tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return {"generation_config": config}
