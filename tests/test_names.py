"""Names become parts of paths: what is accepted stays inside the folder that it is put into."""

import os
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qwen_vl_lora.exceptions import ParameterError
from qwen_vl_lora.names import check_name, is_name


@pytest.mark.parametrize(
    "name",
    ["tiny", "own_captions", "__default__", "2026-11-29T08.24.48.000Z", "a..b", "c++", "猫", "Ünïcode", "0"],
)
def test_usual_names_are_accepted(name):
    assert check_name("recipe", name) == name


@pytest.mark.parametrize(
    "value",
    [
        "", ".", "..", "../x", "a/b", "/etc", "a\\b", "..\\x", ".hidden", "-rf", "a b", "a\n", "\na", "a\0b", "~",
        "~root", "C:", "a:b", "${x}", "a\u2215b", "a\u202eb", "\ud800", "x" * 101,
        "猫" * 34, None, 3, True, ["tiny"], {"a": 1},
    ],
)  # fmt: skip
def test_anything_else_is_refused_and_the_message_says_where_and_what(value):
    with pytest.raises(ParameterError, match=r"^--env: expected a name .* got "):
        check_name("--env", value)


@given(st.text(max_size=120))
@example("..")
@example("a/../../b")
@example("con\u0000")
def test_an_accepted_text_is_one_part_of_a_path(text):
    if not is_name(text):
        return
    path = Path("/project/data", text)
    assert path.parent == Path("/project/data")
    assert os.path.normpath(path) == str(path)
    assert len(os.fsencode(text)) <= 100
    assert text.isprintable()
    assert not text.startswith((".", "-", "~"))
