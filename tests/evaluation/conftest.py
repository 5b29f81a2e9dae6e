from __future__ import annotations

from collections.abc import Callable

import pandas as pd
import pytest

from evaluation.rows import Row, table_of
from qwen_vl_lora.parameters import ScoringParameters


@pytest.fixture
def make_predictions() -> Callable[[list[Row]], pd.DataFrame]:
    return table_of


@pytest.fixture
def scoring() -> ScoringParameters:
    return ScoringParameters(tokenizer="ptb", bootstrap_samples=200, seed=7, settings_from="parameters")


@pytest.fixture
def clip_path(tmp_path):
    """A random CLIP of 24 tokens, whose tokenizer knows bytes only."""
    import torch
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**small, "vocab_size": len(tokens), "max_position_embeddings": 24, "bos_token_id": len(tokens) - 2}
    vision = {**small, "image_size": 32, "patch_size": 16}
    torch.manual_seed(0)
    config = CLIPConfig(text_config={**text, "eos_token_id": len(tokens) - 1}, vision_config=vision, projection_dim=8)
    processor = CLIPProcessor(
        CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        CLIPTokenizer(vocab={token: place for place, token in enumerate(tokens)}, merges=[]),
    )
    CLIPModel(config).save_pretrained(tmp_path / "clip")
    processor.save_pretrained(tmp_path / "clip")
    return tmp_path / "clip"
