"""Greedy caption generation in batches of similar length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from qwen_vl_lora.features.inputs import PictureInputs
from qwen_vl_lora.model.chat import EncodedConversation
from qwen_vl_lora.parameters import GenerationParameters


class Caption(NamedTuple):
    """A generated caption.

    Attributes:
        text: without special tokens and edge blanks.
        is_cut: whether `max_new_tokens` ended it instead of the model.
    """

    text: str
    is_cut: bool


def write_captions(
    model: Any,
    processor: Any,
    prompts: Sequence[EncodedConversation],
    pictures: PictureInputs,
    generation: GenerationParameters,
    description: str | None,
) -> list[Caption]:
    """One caption for each prompt, in the order of the prompts.

    Batches give the same captions as single prompts, because rows are padded on the left and padding is masked.

    Args:
        prompts: from `ChatEncoder.encode_prompt`.
        description: label of the progress bar; None shows none.
    """
    from tqdm import tqdm

    captions: dict[int, Caption] = {}
    disable = True if description is None else None
    with tqdm(total=len(prompts), desc=description, unit="caption", leave=False, disable=disable) as bar:
        for batch in batches_of(prompts, generation.batch_size):
            asked = [prompts[index] for index in batch]
            captions.update(zip(batch, write_batch(model, processor, asked, pictures, generation), strict=True))
            bar.update(len(batch))
    return [captions[index] for index in range(len(prompts))]


def batches_of(prompts: Sequence[EncodedConversation], size: int) -> list[list[int]]:
    """Indices of the prompts of each batch; prompts of similar length share one."""
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index].ids))
    return [order[start : start + size] for start in range(0, len(order), size)]


def write_batch(
    model: Any,
    processor: Any,
    prompts: Sequence[EncodedConversation],
    pictures: PictureInputs,
    generation: GenerationParameters,
    **watching: Any,
) -> list[Caption]:
    """One caption for each prompt, all generated at once.

    Args:
        watching: a `streamer` or `stopping_criteria` for transformers' `generate`.
    """
    from transformers import BatchFeature

    tokenizer = processor.tokenizer
    model.eval()
    inputs = BatchFeature(batch_prompts(prompts, tokenizer.pad_token_id, pictures)).to(model.device)
    with torch.inference_mode():
        ids = model.generate(**inputs, **watching, generation_config=_greedy(model, tokenizer, generation))
    written = ids[:, inputs["input_ids"].shape[1] :]
    ends = torch.tensor(end_tokens(model, tokenizer), device=written.device)
    ended = torch.isin(written, ends).any(dim=1).tolist()
    texts = tokenizer.batch_decode(written, skip_special_tokens=True)
    return [Caption(text.strip(), not has_end) for text, has_end in zip(texts, ended, strict=True)]


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Token ids that end an answer."""
    ends = model.generation_config.eos_token_id
    ends = tokenizer.eos_token_id if ends is None else ends
    return ends if isinstance(ends, list) else [ends]


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


def _greedy(model: Any, tokenizer: Any, generation: GenerationParameters) -> Any:
    """A greedy generation config; the base's own generation_config samples."""
    from transformers import GenerationConfig

    return GenerationConfig(
        max_new_tokens=generation.max_new_tokens,
        repetition_penalty=generation.repetition_penalty,
        do_sample=False,
        num_beams=1,
        eos_token_id=end_tokens(model, tokenizer),
        pad_token_id=tokenizer.pad_token_id,
    )
