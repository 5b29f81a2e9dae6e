"""The tables that spreadsheets, programs and hands write: each is read right, or says what is wrong with it."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen_vl_lora.exceptions import DataFormatError
from qwen_vl_lora.samples.records import RowError
from qwen_vl_lora.samples.tables import first_line, read_table, require_text
from samples.pictures import write

COLUMNS = ("image_path", "caption")
HEADER = "image_path,caption\n"
DOG = [("a.jpg", "A dog, running.")]


def read(file: Path, content: str | bytes) -> list[tuple[str, str] | str]:
    """Path and caption of each record, or its reason; the numbers run from 1 without a gap."""
    write(file, content if isinstance(content, bytes) else content.encode())
    with file.open("rb") as opened:
        require_text(opened, file)
        (_, header), *records = list(read_table(opened, file, lambda names: set(COLUMNS) <= set(names)))
    assert [row for row, _ in records] == list(range(1, len(records) + 1))
    if not set(COLUMNS) <= set(header):
        raise DataFormatError(f"{file}: its first line has: {first_line(header)}")
    return [
        record.reason if isinstance(record, RowError) else tuple(record[header.index(name)] for name in COLUMNS)
        for _, record in records
    ]


@pytest.mark.parametrize(
    "content",
    [
        pytest.param('image_path,caption\na.jpg,"A dog, running."\n', id="plain"),
        pytest.param('image_path;caption\r\na.jpg;"A dog, running."\r\n', id="semicolons, as Excel writes in Europe"),
        pytest.param("image_path\tcaption\na.jpg\tA dog, running.\n", id="tabs"),
        pytest.param('\ufeffimage_path,caption\r\na.jpg,"A dog, running."\r\n', id="Excel's CSV UTF-8"),
        pytest.param('\ufeff"image_path","caption"\n"a.jpg","A dog, running."\n', id="mark and quoted header"),
        pytest.param('\ufeff\ufeffimage_path,caption\na.jpg,"A dog, running."\n', id="two marks"),
        pytest.param('\n  \nimage_path,caption\n\na.jpg,"A dog, running."\n\n', id="blank lines"),
        pytest.param(' image_path , caption \na.jpg, "A dog, running."\n', id="blanks behind commas"),
        pytest.param('caption,note,image_path\n"A dog, running.",x,a.jpg\n', id="other columns and order"),
        pytest.param('image_path,caption,\na.jpg,"A dog, running.",\n', id="a comma too many in every line"),
        pytest.param('image_path,caption,"a\nnote"\na.jpg,"A dog, running.",x\n', id="a header over two lines"),
        pytest.param('image_path,caption\na.jpg,"A dog, running."', id="no line end"),
        pytest.param("image_path|caption\na.jpg|A dog, running.\n", id="pipes, as Flickr30k's captions"),
        pytest.param('image_path| note| caption\na.jpg| "x| A dog, running.\n', id="pipes with a lone quote"),
        pytest.param('sep=;\nimage_path;caption\na.jpg;"A dog, running."\n', id="Excel's line about its delimiter"),
        pytest.param('# by hand\n#\nimage_path,caption\na.jpg,"A dog, running."\n', id="comments first"),
        pytest.param('image_path,caption\ra.jpg,"A dog, running."\r', id="lines of old Macs"),
    ],
)
def test_each_way_to_write_a_table_is_read(tmp_path, content):
    assert read(tmp_path / "c.csv", content) == DOG


@pytest.mark.parametrize(
    ("lines", "outcome"),
    [
        ("a.jpg\nb.jpg,A cat.", ["missing_key", ("b.jpg", "A cat.")]),
        ("a.jpg,A dog, running.\nb.jpg,A cat.", ["malformed_row", ("b.jpg", "A cat.")]),
        ('a.jpg,"A" dog\nb.jpg,A cat.', ["malformed_row", ("b.jpg", "A cat.")]),
        ('a.jpg,"A \\"dog\\""\nb.jpg,A cat.', ["malformed_row", ("b.jpg", "A cat.")]),
        ("a.jpg,A\rdog\nb.jpg,A cat.", ["malformed_row", ("b.jpg", "A cat.")]),
        ('b.jpg,A cat.\na.jpg,"A dog', [("b.jpg", "A cat."), "malformed_row"]),
        ('a.jpg,A 5" dog\nb.jpg,A cat.', [("a.jpg", 'A 5" dog'), ("b.jpg", "A cat.")]),
        ('a.jpg,"A\r\ndog"\nb.jpg,A cat.', [("a.jpg", "A\r\ndog"), ("b.jpg", "A cat.")]),
        ("b.jpg,A cat.\n\x1a", [("b.jpg", "A cat."), "missing_key"]),
        (",\nb.jpg,A cat.", [("", ""), ("b.jpg", "A cat.")]),
    ],
)
def test_a_bad_record_is_told_apart_and_the_others_go_on(tmp_path, lines, outcome):
    assert read(tmp_path / "c.csv", HEADER + lines) == outcome


def test_bytes_that_are_not_utf8_spoil_their_own_record(tmp_path):
    rows = read(tmp_path / "c.csv", HEADER.encode() + b"a.jpg,caf\xe9\nb.jpg,A cat.\n")
    assert rows == [("a.jpg", "caf\udce9"), ("b.jpg", "A cat.")]


@pytest.mark.parametrize(
    ("message", "content"),
    [
        ("is UTF-16", HEADER.encode("utf-16")),
        (r"is not UTF-8 text: it begins with 'i\\x00m", HEADER.encode("utf-16-le")),
        (r"is a zip archive; unpack it", b"PK\x03\x04\x14\x00\x06\x00"),
        ("first line has: a.jpg, A dog", "a.jpg,A dog.\n"),
        ("first line has: nothing", "\n\n"),
        ("its first line cannot be read: a carriage return outside of quotes", "image_path,cap\rtion\na.jpg,A dog.\n"),
        ("line 4: unexpected end of data.*The record starts in line 3", f'\n{HEADER}a.jpg,"A dog\nb.jpg,A cat.'),
        ("line 3: ',' expected after '\"'.*starts in line 2", f'{HEADER}a.jpg,"A dog\nb.jpg,"A cat."\nc.jpg,x\n'),
    ],
)
def test_a_table_whose_records_cannot_be_told_stops(tmp_path, message, content):
    with pytest.raises(DataFormatError, match=rf"(?s)c\.csv.*{message}"):
        read(tmp_path / "c.csv", content)


CELLS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8) | st.sampled_from(
    ["", '"', ",", ";", "\t", "\n", "\r\n", "a.jpg", "'", "\\", "=1"]
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(rows=st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=5), separator=st.sampled_from(",;\t"))
def test_what_pandas_writes_is_read_back(tmp_path, rows, separator):
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    table.to_csv(tmp_path / "out.csv", index=False, sep=separator, quoting=1, lineterminator="\n")
    assert read(tmp_path / "c.csv", (tmp_path / "out.csv").read_bytes()) == rows


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    content=st.binary(max_size=60) | st.text('",;\n\r\t ab\0\ufeff', max_size=40).map(str.encode), header=st.booleans()
)
def test_any_bytes_are_records_or_one_message(tmp_path, content, header):
    with contextlib.suppress(DataFormatError):
        read(tmp_path / "c.csv", (HEADER.encode() if header else b"") + content)
