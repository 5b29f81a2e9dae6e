"""The licence of a base is read from its README, whatever that file is; it never ends an export."""

from __future__ import annotations

import os
import shutil

import pytest

from qwen_vl_lora.model.base_model import BaseModel
from qwen_vl_lora.model.merging import MergeCheck
from qwen_vl_lora.model.model_card import model_card
from tiny_adapters import adapter_record

HEAD = "---\nlicense: apache-2.0\ntags: [x]\n---\n"


@pytest.fixture
def card(base_path, tmp_path):
    """`card(bytes)`: the model card beside a README of these bytes, or of nothing."""
    folder = shutil.copytree(base_path("qwen2_vl"), tmp_path / "base")

    def make(readme: bytes | None) -> str:
        (folder / "README.md").unlink(missing_ok=True)
        if readme is not None:
            (folder / "README.md").write_bytes(readme)
        return card_of(folder)

    return make


def card_of(folder):
    scores = {"CIDEr": 1.0}
    metrics = {"num_images": 1, "tokenizer": "ptb", "base": scores, "tuned": scores, "delta": scores}
    check = MergeCheck(dtype="float32", error=0.0, effect=1.0, tolerance=1e-4)
    return model_card(BaseModel("tiny", folder), adapter_record(), metrics, check)


@pytest.mark.parametrize(
    "readme",
    [
        HEAD.encode(),
        HEAD.encode() + "视觉语言模型".encode("gbk"),
        HEAD.replace("[x]", "[中文]").encode("gbk"),
        HEAD.encode("utf-8-sig"),
        HEAD.replace("\n", "\r\n").encode(),
        HEAD.encode() + b"\xff\x00" * 5_000_000,
        HEAD.replace("apache-2.0", '"apache-2.0"').encode(),
    ],
)
def test_the_licence_is_read_whatever_the_encoding_and_length(card, readme):
    assert "license: apache-2.0\n" in card(readme)


@pytest.mark.parametrize(
    "readme",
    [
        None,
        b"",
        b"\xd6\xd0\xce\xc4",
        "许可".encode("utf-16"),
        b"license: apache-2.0",
        b"---\nlicense:\n---\n",
        b"---\nlicense: \xd6\xd0\n---\n",
        b"---\nlicense: [a, b]\n---\n",
        b"---\nlicense: x: {y: z}\n---\n",
        b"---\n---\nlicense: apache-2.0\n",
    ],
)
def test_a_licence_that_is_not_stated_by_its_name_is_not_stated(card, readme):
    text = card(readme)
    assert "\nlicense:" not in text
    assert "base model: not stated in its folder" in text


def test_a_readme_that_is_no_file_is_not_waited_for(base_path, tmp_path):
    folder = shutil.copytree(base_path("qwen2_vl"), tmp_path / "base")
    os.mkfifo(folder / "README.md")
    assert "base model: not stated" in card_of(folder)
    (folder / "README.md").unlink()
    (folder / "README.md").mkdir()
    assert "base model: not stated" in card_of(folder)
