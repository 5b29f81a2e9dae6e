"""Files of records are plain JSON, one record a line."""

import json
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_vl_lora.exceptions import DataFormatError
from qwen_vl_lora.samples.record_files import (
    Records,
    RecordsInTheMaking,
    TooDeep,
    open_records,
    read_records,
    write_records,
)
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


ROWS = [{"id": f"identity_{row}", "text": "一" * (row % 7), "row": row} for row in range(10_000)]


@pytest.fixture
def stored(tmp_path) -> Records:
    write_records(ROWS, tmp_path / "records.json")
    return open_records(tmp_path / "records.json")


def test_records_are_the_list_that_was_written(stored):
    assert isinstance(stored, Records)
    assert stored == ROWS
    assert ROWS == stored  # noqa: SIM300 - a list asks the records
    assert stored != ROWS[1:]
    assert (len(stored), stored[0], stored[-1], stored[5:9:2]) == (10_000, ROWS[0], ROWS[-1], ROWS[5:9:2])
    with pytest.raises(IndexError):
        stored[10_000]


def test_chosen_records_are_written_as_they_stood(stored, tmp_path):
    places = np.array([9_999, 3, 4, 0])
    chosen = stored.choose(places)
    write_records(chosen, tmp_path / "chosen.json")
    write_records([ROWS[place] for place in places], tmp_path / "expected.json")
    assert (tmp_path / "chosen.json").read_bytes() == (tmp_path / "expected.json").read_bytes()
    assert chosen[1] == ROWS[3]


def test_records_are_there_for_another_process_and_after_their_file_was_removed(stored, tmp_path):
    chosen = pickle.loads(pickle.dumps(stored.choose(np.array([7, 2]))))
    (tmp_path / "records.json").unlink()
    assert chosen == [ROWS[7], ROWS[2]]
    assert stored[9_000] == ROWS[9_000]


def test_records_in_the_making_leave_no_file(tmp_path):
    with RecordsInTheMaking(tmp_path) as made:
        for row in ROWS:
            made.append(row)
        records = made.finish()
    assert records == ROWS
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(TypeError, match="save them first"):
        pickle.dumps(records)


@pytest.mark.parametrize(
    "text",
    ["[]", "[ ]\n", '[{"a": 1}]', '[\n{"a": 1},\n 2\n]\n', '{"a": 1}', json.dumps(ROWS[:3], indent=0), "[\n1,\n2\n]\n"],
)
def test_a_file_of_another_layout_is_read_as_a_whole(text, tmp_path):
    (tmp_path / "records.json").write_text(text)
    assert open_records(tmp_path / "records.json") == json.loads(text)


def test_a_line_that_is_no_json_is_refused_with_its_file(tmp_path):
    (tmp_path / "records.json").write_text('[\n{"a": 1},\n{"a": 2\n]\n')
    records = open_records(tmp_path / "records.json")
    assert records[0] == {"a": 1}
    with pytest.raises(DataFormatError, match=r"records\.json has a line that is not a record"):
        list(records)
