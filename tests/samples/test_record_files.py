"""Files of records are plain JSON, one record a line."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_vl_lora.samples.record_files import TooDeep, read_records, write_records
from qwen_vl_lora.strict_json import MAX_DEPTH


@pytest.mark.parametrize("records", [[], [{"id": "一", "turns": []}], [{"a": "line\nbreak"}, {"b": None}, {"c": [1]}]])
def test_what_is_written_reads_back_with_one_line_for_each_record(records, tmp_path):
    file = tmp_path / "records.json"
    write_records(iter(records), file)
    text = file.read_text(encoding="utf-8")
    assert json.loads(text) == records
    assert len(text.splitlines()) == (len(records) + 2 if records else 1)


DEEP = '{"a": ' * 200_000 + '"]}\\"[{" ' + "}" * 200_000


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("blank", ["", " ", "\n"])
def test_a_record_that_is_too_deep_is_skipped_alone(place, blank):
    texts = ['{"a": "]}\\"[{"}', "[1, [2]]"]
    texts.insert(place, DEEP)
    records = read_records(f"{blank}[{blank}{f'{blank},{blank}'.join(texts)}{blank}]{blank}")
    assert isinstance(records.pop(place), TooDeep)
    assert records == [{"a": ']}"[{'}, [1, [2]]]


@pytest.mark.parametrize("nested", [MAX_DEPTH + 1, 400])
def test_a_record_that_parses_but_is_too_deep_to_walk_through_is_skipped_too(nested):
    records = read_records(f"[1, {'[' * nested}{']' * nested}]")
    assert records[0] == 1
    assert isinstance(records[1], TooDeep)


@pytest.mark.parametrize("text", ["[%s", "[%s,]", "[%s 1]", "[,%s]", "[%s]]", "[%s, x]", "%s]", '["a, %s]'])
def test_a_list_that_is_broken_beside_a_deep_record_is_no_json(text):
    with pytest.raises(ValueError, match=r"line 1|Extra data|Expecting"):
        read_records(text % DEEP)


@given(st.recursive(st.none() | st.integers() | st.text(max_size=3), lambda t: st.lists(t, max_size=3), max_leaves=9))
@settings(max_examples=60, deadline=None)
def test_beside_a_deep_record_every_other_one_is_read_as_alone(tree):
    records = read_records(f"[{json.dumps(tree)}, {'[' * 100_000}{']' * 100_000}, {json.dumps(tree)}]")
    assert [records[0], records[2]] == [tree, tree]
