"""The untrained tiny base: a small Qwen2-VL with its own byte-level vocabulary.

Classes, special tokens, chat format and preprocessing are Qwen2-VL's; only the sizes and
the vocabulary are small. Independent of its training.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import (
    GenerationConfig,
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from qwen_vl_lora.model.families import QWEN2_VL
from qwen_vl_lora.model.families.family import IM_END, IM_START, IMAGE_TOKEN, VISION_END, VISION_START
from qwen_vl_lora.tiny.dialogue import random_conversation
from qwen_vl_lora.tiny.drawing import random_scene
from qwen_vl_lora.tiny.language import short_captions

_VOCABULARY_LIMIT = 2_000
_CORPUS_CONVERSATIONS, _CORPUS_CAPTIONS = 3_000, 1_000

END_OF_TEXT = "<|endoftext|>"

SPECIAL_TOKENS = (
    END_OF_TEXT,
    IM_START,
    IM_END,
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    VISION_START,
    VISION_END,
    "<|vision_pad|>",
    IMAGE_TOKEN,
    "<|video_pad|>",
)
"""Qwen2-VL's special tokens, in its order. Their ids differ because they follow a smaller vocabulary."""

CHAT_TEMPLATE = """\
{%- set pictures = namespace(count=0) -%}
{%- set videos = namespace(count=0) -%}
{%- for message in messages -%}
    {%- if loop.first and message['role'] != 'system' -%}
        {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
    {%- endif -%}
    {{- '<|im_start|>' + message['role'] + '\\n' -}}
    {%- if message['content'] is string -%}
        {{- message['content'] -}}
    {%- else -%}
        {%- for part in message['content'] -%}
            {%- if part['type'] == 'image' or 'image' in part or 'image_url' in part -%}
                {%- set pictures.count = pictures.count + 1 -%}
                {%- if add_vision_id -%}{{- 'Picture ' ~ pictures.count ~ ': ' -}}{%- endif -%}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
            {%- elif part['type'] == 'video' or 'video' in part -%}
                {%- set videos.count = videos.count + 1 -%}
                {%- if add_vision_id -%}{{- 'Video ' ~ videos.count ~ ': ' -}}{%- endif -%}
                {{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
            {%- elif 'text' in part -%}
                {{- part['text'] -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


@dataclass(frozen=True, slots=True)
class TinySizes:
    """Widths and depths. Heads are 32 wide, so M-RoPE's three sections share 16 frequencies."""

    hidden: int = 160
    intermediate: int = 448
    layers: int = 4
    heads: int = 5
    key_value_heads: int = 1
    vision_width: int = 128
    vision_depth: int = 3
    vision_heads: int = 4
    rope_theta: float = 1e4
    initializer_range: float = 0.06


def build_processor(seed: int) -> Qwen2VLProcessor:
    """Train a vocabulary on the scenes' texts and combine it with Qwen2-VL's own preprocessing."""
    return processor_of(_train_tokenizer(random.Random(f"vocabulary/{seed}")))


def processor_of(tokenizer: Qwen2Tokenizer) -> Qwen2VLProcessor:
    """Combine a tokenizer with Qwen2-VL's own preprocessing and chat format."""
    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=CHAT_TEMPLATE,
    )


def build_model(sizes: TinySizes, tokenizer: Qwen2Tokenizer, seed: int) -> Qwen2VLForConditionalGeneration:
    """Return the model with random weights in float32."""
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": sizes.hidden,
            "intermediate_size": sizes.intermediate,
            "num_hidden_layers": sizes.layers,
            "num_attention_heads": sizes.heads,
            "num_key_value_heads": sizes.key_value_heads,
            "max_position_embeddings": tokenizer.model_max_length,
            "rope_parameters": {"rope_type": "default", "rope_theta": sizes.rope_theta, "mrope_section": [4, 6, 6]},
            "bos_token_id": ids[END_OF_TEXT],
            "eos_token_id": ids[IM_END],
            "pad_token_id": ids[END_OF_TEXT],
            "initializer_range": sizes.initializer_range,
        },
        vision_config={
            "embed_dim": sizes.vision_width,
            "depth": sizes.vision_depth,
            "num_heads": sizes.vision_heads,
            "hidden_size": sizes.hidden,
            "initializer_range": sizes.initializer_range,
        },
        image_token_id=ids[IMAGE_TOKEN],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids[VISION_START],
        vision_end_token_id=ids[VISION_END],
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    model = Qwen2VLForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        bos_token_id=ids[END_OF_TEXT],
        eos_token_id=[ids[IM_END], ids[END_OF_TEXT]],
        pad_token_id=ids[END_OF_TEXT],
        do_sample=False,
        repetition_penalty=1.0,
    )
    return model


def _train_tokenizer(rng: random.Random) -> Qwen2Tokenizer:
    """Learn merges until every word of the corpus is one token; all 256 bytes are tokens too."""
    trained = Tokenizer(BPE())
    # Qwen's own splitting, so that training and use split words alike.
    trained.pre_tokenizer = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    trainer = BpeTrainer(
        vocab_size=_VOCABULARY_LIMIT,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    trained.train_from_iterator(_corpus(rng), trainer)
    bpe = json.loads(trained.to_str())["model"]
    return tokenizer_of(bpe["vocab"], [tuple(merge) for merge in bpe["merges"]], 4096)


def tokenizer_of(vocabulary: dict[str, int], merges: list[tuple[str, str]], longest: int) -> Qwen2Tokenizer:
    """Qwen2-VL's tokenizer of a vocabulary, whose ids are followed by those of the special tokens.

    Args:
        longest: tokens of the longest text, as the tokenizer states it.
    """
    specials = {token: len(vocabulary) + offset for offset, token in enumerate(SPECIAL_TOKENS)}
    return Qwen2Tokenizer(
        vocab=vocabulary | specials,
        merges=merges,
        eos_token=IM_END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=list(SPECIAL_TOKENS[1:]),
        model_max_length=longest,
        # Batched generation continues each prompt at its last token.
        padding_side="left",
    )


def _corpus(rng: random.Random) -> Iterator[str]:
    for _ in range(_CORPUS_CONVERSATIONS):
        for exchange in random_conversation(rng):
            yield f"system\n{QWEN2_VL.default_system}\nuser\n{exchange.question}\nassistant\n"
            yield exchange.answer
    for _ in range(_CORPUS_CAPTIONS):
        yield from short_captions(random_scene(rng))
