"""How captions are cut into the tokens that metrics count: `ptb` for English, `characters` for Chinese.

A score is comparable only with scores over the same tokens, so the name of the tokenizer is part of
the metrics. Both lower-case and drop punctuation.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable
from typing import Literal

from qwen_vl_lora.scoring.ptb import ptb_tokens

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

    `auto` counts the references as `characters` would cut them: where at least half of all tokens are
    single Chinese, Japanese or Korean characters it is `characters`, otherwise `ptb`. References
    decide, never captions: base and tuned must be counted alike.
    """
    if setting != "auto":
        return setting
    tokens = [token for reference in references for token in character_tokens(reference)]
    single = sum(_CJK_TOKEN.fullmatch(token) is not None for token in tokens)
    return "characters" if tokens and 2 * single >= len(tokens) else "ptb"
