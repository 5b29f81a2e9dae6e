"""Caption generation in batches of similar length: greedy, or drawn where inference asks for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from qwen_vl_lora.features.inputs import PictureInputs
from qwen_vl_lora.inference_parameters import SamplingParameters
from qwen_vl_lora.model.chat import EncodedConversation
from qwen_vl_lora.parameters import GenerationParameters
from qwen_vl_lora.runs.artifacts import digest

GREEDY = SamplingParameters()
"""The likeliest word each time."""


class Caption(NamedTuple):
    """A generated caption.

    Attributes:
        text: without special tokens and edge blanks.
        is_cut: whether `max_new_tokens` ended it instead of the model.
        reason: why a server gave none, as `word: sentence`; else empty.
    """

    text: str
    is_cut: bool
    reason: str = ""


def write_captions(
    model: Any,
    processor: Any,
    prompts: Sequence[EncodedConversation],
    pictures: PictureInputs,
    generation: GenerationParameters,
    description: str | None,
    sampling: SamplingParameters = GREEDY,
) -> list[Caption]:
    """One caption for each prompt, in the order of the prompts.

    Batches give the same captions as single prompts, because rows are padded on the left and padding is masked.

    Args:
        prompts: from `ChatEncoder.encode_prompt`.
        description: label of the progress bar; None shows none.
        sampling: draws of a batch depend on its seed and on the batch's pictures.
    """
    from tqdm import tqdm

    captions: dict[int, Caption] = {}
    disable = True if description is None else None
    with tqdm(total=len(prompts), desc=description, unit="caption", leave=False, disable=disable) as bar:
        for batch in batches_of(prompts, generation.batch_size):
            asked = [prompts[index] for index in batch]
            written = write_batch(model, processor, asked, pictures, generation, sampling)
            captions.update(zip(batch, written, strict=True))
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
    sampling: SamplingParameters = GREEDY,
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
    config = _generation_config(model, tokenizer, generation, sampling)
    with torch.inference_mode(), torch.random.fork_rng(devices=_devices(model)):
        torch.manual_seed(seed_of(sampling, [name for prompt in prompts for name in prompt.images]))
        ids = model.generate(**inputs, **watching, generation_config=config)
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


def seed_of(sampling: SamplingParameters, images: Sequence[str]) -> int:
    """The seed for questions about these pictures, so that draws do not depend on what was asked before."""
    return int(digest([sampling.seed, *images])[:7], 16)


def _devices(model: Any) -> list[Any]:
    """The GPU whose random state draws change."""
    return [model.device] if model.device.type == "cuda" else []


def _generation_config(
    model: Any, tokenizer: Any, generation: GenerationParameters, sampling: SamplingParameters
) -> Any:
    """How tokens are chosen; nothing of the base's own generation_config, which samples, except its ends."""
    from transformers import GenerationConfig

    draws = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0} if sampling.temperature else {}
    return GenerationConfig(
        max_new_tokens=generation.max_new_tokens,
        repetition_penalty=generation.repetition_penalty,
        do_sample=bool(draws),
        num_beams=1,
        eos_token_id=end_tokens(model, tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        **draws,
    )
