"""Tokenizers for the metrics: `ptb` for English, `characters` for Chinese.

Scores are comparable only over the same tokens, so the name of the tokenizer is part of the metrics. Both
tokenizers lower-case and drop punctuation.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable
from typing import Literal

from qwen_vl_lora.evaluation.ptb import ptb_tokens

TokenizerName = Literal["ptb", "characters"]
Tokenizer = Callable[[str], list[str]]

# Ideographs with their extensions, 々〆, kana with the long-vowel mark, hangul. These are written without blanks
# between words (hangul: with blanks, but words carry particles), so n-grams are counted over characters.
CJK = "\u3005\u3006\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003fffd"
_CHARACTER_TOKEN = re.compile(rf"[{CJK}]|[^\W_{CJK}]+(?:['’.,:-][^\W_{CJK}]+)*")
_CJK_TOKEN = re.compile(rf"[{CJK}]")


def character_tokens(caption: str) -> list[str]:
    """One token for each Chinese, Japanese or Korean character; other words stay whole."""
    return _CHARACTER_TOKEN.findall(unicodedata.normalize("NFKC", caption).lower())


TOKENIZERS: dict[TokenizerName, Tokenizer] = {"ptb": ptb_tokens, "characters": character_tokens}


def choose_tokenizer(setting: Literal["auto", "ptb", "characters"], references: Iterable[str]) -> TokenizerName:
    """The tokenizer that `scoring.tokenizer` asks for.

    `auto` splits the references with `characters`. If at least half of all tokens are single Chinese,
    Japanese or Korean characters, it selects `characters`, otherwise `ptb`. Only references count, because
    base and tuned captions need the same tokenizer.
    """
    if setting != "auto":
        return setting
    tokens = [token for reference in references for token in character_tokens(reference)]
    single = sum(_CJK_TOKEN.fullmatch(token) is not None for token in tokens)
    return "characters" if tokens and 2 * single >= len(tokens) else "ptb"
