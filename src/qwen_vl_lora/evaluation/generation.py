"""Caption generation in batches of similar length: greedy, or drawn where inference asks for it."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from qwen_vl_lora.evaluation.decoding import Decoder, keeps_all_tokens
from qwen_vl_lora.features.inputs import PictureInputs, read_ahead
from qwen_vl_lora.inference_parameters import SamplingParameters
from qwen_vl_lora.model.chat import EncodedConversation, rope_positions
from qwen_vl_lora.parameters import GenerationParameters
from qwen_vl_lora.runs.artifacts import digest

GREEDY = SamplingParameters()
"""The likeliest word each time."""

_BATCHES_SORTED = 4
"""Batches of prompts that are sorted by their length together."""


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
    written = write_each(model, processor, prompts, pictures, generation, sampling)
    with tqdm(written, total=len(prompts), desc=description, unit="caption", leave=False, disable=disable) as bar:
        captions.update(bar)
    return [captions[index] for index in range(len(prompts))]


def write_each(
    model: Any,
    processor: Any,
    prompts: Iterable[EncodedConversation],
    pictures: PictureInputs,
    generation: GenerationParameters,
    sampling: SamplingParameters = GREEDY,
) -> Iterator[tuple[int, Caption]]:
    """The number of a prompt and its caption, as captions end. Prompts are taken as they are needed.

    Pictures are prepared in a thread while others are captioned. Drawn captions, and those of a base that keeps more
    than keys and values, are written by `write_batch`.
    """
    if sampling.temperature or not keeps_all_tokens(model):
        for group in _of_similar_length(prompts, generation.batch_size):
            captions = write_batch(model, processor, list(group.values()), pictures, generation, sampling)
            yield from zip(group, captions, strict=True)
        return
    model.eval()
    tokenizer = processor.tokenizer
    ends = end_tokens(model, tokenizer)
    decoder = Decoder(model, ends, generation.max_new_tokens, generation.repetition_penalty)

    def prepare(group: dict[int, EncodedConversation]) -> tuple[list[int], dict[str, Any], int]:
        asked = list(group.values())
        shared = _shared_beginning(asked)
        inputs = batch_prompts(asked, tokenizer.pad_token_id, pictures, shared)
        positions = [rope_positions(prompt, processor.image_processor.merge_size) for prompt in asked]
        inputs["position_ids"] = _padded(positions, inputs["input_ids"].shape[1], shared).transpose(0, 1)
        del inputs["mm_token_type_ids"]  # of use only to find the positions
        return list(group), inputs, shared

    for numbers, inputs, shared in read_ahead(prepare, _of_similar_length(prompts, generation.batch_size)):
        for row, ids in decoder.answers(inputs, shared):
            text = tokenizer.decode(ids, skip_special_tokens=True)
            yield numbers[row], Caption(text.strip(), ids[-1] not in ends)


def _of_similar_length(prompts: Iterable[EncodedConversation], size: int) -> Iterator[dict[int, EncodedConversation]]:
    """The prompts by their numbers, in batches."""
    numbered = enumerate(prompts)
    while window := dict(itertools.islice(numbered, size * _BATCHES_SORTED)):
        numbers = list(window)
        for batch in batches_of(list(window.values()), size):
            yield {numbers[index]: window[numbers[index]] for index in batch}


def _shared_beginning(prompts: Sequence[EncodedConversation]) -> int:
    """Tokens that all prompts begin with, before any picture and the last token."""
    width = min(len(prompt.ids) for prompt in prompts) - 1
    ids = np.stack([prompt.ids[:width] for prompt in prompts])
    is_shared = (ids == ids[0]).all(axis=0) & ~np.stack([prompt.is_image[:width] for prompt in prompts]).any(axis=0)
    return width if is_shared.all() else int(is_shared.argmin())


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


def batch_prompts(
    prompts: Sequence[EncodedConversation], pad_id: int, pictures: PictureInputs, shared: int = 0
) -> dict[str, Any]:
    """Model inputs (B, T) for prompts, padded on the left, but for the `shared` tokens that all begin with."""
    width = max(len(prompt.ids) for prompt in prompts)
    grids = [grid for prompt in prompts for grid in prompt.grids]
    inputs: dict[str, Any] = {
        "input_ids": _padded([prompt.ids for prompt in prompts], width, shared, pad_id),
        "attention_mask": _padded([np.ones_like(prompt.ids) for prompt in prompts], width, shared),
        "mm_token_type_ids": _padded([prompt.is_image for prompt in prompts], width, shared),
    }
    if grids:
        inputs["image_grid_thw"] = torch.tensor(grids)
    return {**inputs, **pictures([name for prompt in prompts for name in prompt.images])}


def _padded(rows: Sequence[np.ndarray], width: int, shared: int, fill: int = 0) -> torch.Tensor:
    """Rows (…, tokens) as one int64 tensor (B, …, width)."""
    padded = np.full((len(rows), *rows[0].shape[:-1], width), fill, dtype=np.int64)
    for number, row in enumerate(rows):
        padded[number, ..., :shared] = row[..., :shared]
        padded[number, ..., width - (row.shape[-1] - shared) :] = row[..., shared:]
    return torch.from_numpy(padded)


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
