"""JSON of strangers is plain and whole, or refused with a cause in words."""

from __future__ import annotations

import contextlib
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_vl_lora.exceptions import AdapterError
from qwen_vl_lora.strict_json import MAX_DEPTH, is_deep, parse_json, read_json, read_object, read_regular

TREES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda tree: st.lists(tree, max_size=4) | st.dictionaries(st.text(), tree, max_size=4),
    max_leaves=12,
)


@given(TREES)
@settings(max_examples=100, deadline=None)
def test_plain_json_is_read_as_it_is(tree):
    assert parse_json(json.dumps(tree).encode()) == tree
    assert parse_json(json.dumps(tree, ensure_ascii=False)) == tree


@given(st.binary() | st.text().map(lambda text: f'{{"{text}": 1}}'.encode(errors="replace")))
@settings(max_examples=200, deadline=None)
def test_any_other_bytes_are_a_cause_in_words(data):
    tree = None
    with contextlib.suppress(ValueError):  # and no other error
        tree = parse_json(data)
    assert json.loads(json.dumps(tree, allow_nan=False)) == tree


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "[" * 100_000 + "]" * 100_000, "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1)]
)
def test_what_is_nested_too_deeply_is_refused(text):
    with pytest.raises(ValueError, match="nested more than 100 levels deep"):
        parse_json(text)


def test_depth_is_counted_exactly():
    assert not is_deep(json.loads("[" * MAX_DEPTH + "]" * MAX_DEPTH))
    assert is_deep(json.loads("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1)))


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' occurs twice"),
        ("[NaN]", "NaN is not a finite number"),
        ('{"a": 1e999}', "1e999 is not a finite number"),
        ("-Infinity", "-Infinity is not a finite number"),
        ('"\\ud800"', "half a character"),
        ("1" * 5000, "integer string conversion"),
        ("{} {}", "not valid JSON: Extra data"),
        ("", "not valid JSON"),
    ],
)
def test_what_is_no_plain_json_is_refused_with_its_cause(text, cause):
    with pytest.raises(ValueError, match=cause):
        parse_json(text)


def test_two_halves_of_a_character_are_one():
    assert parse_json('"\\ud83d\\ude00"') == "😀"


def test_a_file_that_is_larger_than_allowed_is_not_read(tmp_path):
    (tmp_path / "x").write_bytes(b"12345")
    with pytest.raises(ValueError, match="expected at most 4 bytes, got 5"):
        read_regular(tmp_path / "x", 4)
    assert read_json(tmp_path / "x") == 12345


def test_what_is_no_object_is_refused_in_the_callers_words(tmp_path):
    file = tmp_path / "x.json"
    for text, cause in (("[1]", "must hold a JSON object; got list"), ("{", "cannot be used: it is not valid JSON")):
        file.write_text(text)
        with pytest.raises(AdapterError, match=rf"x\.json {cause}.*\. Train again\."):
            read_object(file, AdapterError, "Train again.")
    file.write_text('{"a": 1}')
    assert read_object(file, AdapterError, "Train again.") == {"a": 1}
