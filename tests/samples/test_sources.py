from __future__ import annotations

import contextlib
import gzip
import json
import random
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen_vl_lora.exceptions import DataFormatError, MissingArtifactError, QwenVLLoraError
from qwen_vl_lora.parameters import SplitParameters
from qwen_vl_lora.samples.collection import collect
from qwen_vl_lora.samples.conversations import build_conversations
from qwen_vl_lora.samples.records import Rejection, SourceSample, Turn
from qwen_vl_lora.samples.sources import CaptionsFile
from qwen_vl_lora.samples.splitting import split_conversations
from samples.pictures import (
    captions_parameters,
    image_parameters,
    jpeg,
    prompt_parameters,
    quarantine_parameters,
    workspace_folder,
    write,
)

CAPTIONS = [("a.jpg", "A dog."), ("b.jpg", "Two cats, and a “bird”."), ("a.jpg", "一只狗")]


def rows_of(file: Path, content: str | bytes) -> list[SourceSample | Rejection]:
    return list(CaptionsFile(write(file, content if isinstance(content, bytes) else content.encode())))


def outcomes(rows: list[SourceSample | Rejection]) -> list[str]:
    return [row.reason if isinstance(row, Rejection) else row.turns[-1].text for row in rows]


# --- CSV -------------------------------------------------------------------------------------


def test_a_csv_written_by_pandas_is_read(tmp_path):
    table = pd.DataFrame(CAPTIONS, columns=["image_path", "caption"])
    table.to_csv(tmp_path / "captions.csv")  # with pandas' own index column
    rows = list(CaptionsFile(tmp_path / "captions.csv"))
    assert rows == [
        SourceSample(number, name, (tmp_path / name,), (Turn("assistant", text),), id_is_given=False)
        for number, (name, text) in enumerate(CAPTIONS, start=1)
    ]


def test_a_source_is_read_anew_each_time(tmp_path):
    source = CaptionsFile(write(tmp_path / "c.csv", b"image_path,caption\na.jpg,A dog.\n"))
    assert list(source) == list(source)


def test_a_byte_order_mark_blanks_and_any_name_do_not_hurt(tmp_path):
    rows = rows_of(tmp_path / "captions.txt", "\ufeff image_path , caption\r\n\r\na.jpg,A dog.\r\n")
    assert outcomes(rows) == ["A dog."]


def test_a_csv_may_bring_its_own_ids_and_line_breaks(tmp_path):
    (row,) = rows_of(tmp_path / "c.csv", 'image_id,image_path,caption\n391895,a.jpg,"A dog\nruns."\n')
    assert (row.id, row.turns[0].text) == ("391895", "A dog\nruns.")


def test_rows_that_are_not_utf8_are_rejected_alone(tmp_path):
    content = b"image_path,caption\na.jpg,caf\xe9\nb.jpg,A dog.\ncaf\xe9.jpg,A cat.\n"
    rows = rows_of(tmp_path / "c.csv", content)
    (tmp_path / "b.jpg").write_bytes(jpeg())
    collected = collect(
        rows, workspace_folder(tmp_path), captions_parameters(), image_parameters(), quarantine_parameters()
    )
    assert collected.rejected_samples["reason"].tolist() == ["bad_encoding", "bad_encoding"]
    assert len(collected.samples) == 1


@pytest.mark.parametrize(
    ("reason", "line"),
    [
        ("missing_key", "a.jpg"),
        ("malformed_row", "a.jpg,A dog, a cat and a bird"),
        ("missing_image", ",A dog."),
        ("url_not_allowed", "https://example.org/a.jpg,A dog."),
    ],
)
def test_bad_rows_of_a_csv_are_rejected_with_their_reason(tmp_path, reason, line):
    assert outcomes(rows_of(tmp_path / "c.csv", f"image_path,caption\n{line}\nb.jpg,A cat.\n")) == [reason, "A cat."]


def test_a_cell_of_a_million_characters_is_one_row(tmp_path):
    rows = rows_of(tmp_path / "c.csv", f"image_path,caption\na.jpg,{'x' * 1_000_000}\nb.jpg,A cat.\n")
    assert [len(text) for text in outcomes(rows)] == [1_000_000, 6]


@pytest.mark.parametrize(
    ("message", "content"),
    [
        (
            r"needs a column for a caption \(caption\); its first line has: image_path, note",
            "image_path,note\na.jpg,x\n",
        ),
        (r"needs a column for a picture \(image_path\) and one for a caption", "a.jpg:A dog.\nb.jpg:x\n"),
        (r"The column `caption` occurs 2 times", "image_path,caption,caption\na,b,c\n"),
        (r"line 3: unexpected end of data.*unclosed quote", 'image_path,caption\na.jpg,"A dog\nb.jpg,A cat\n'),
        (r"is empty", ""),
        (r"is empty", "\ufeff \n"),
        (r"is UTF-16", "image_path,caption\n".encode("utf-16")),
        (r"is a picture; give the captions file", jpeg()),
        (r"is a zip archive; unpack it", b"PK\x03\x04\x14\x00"),
        (r"is an old Excel workbook", b"\xd0\xcf\x11\xe0\xa1\xb1"),
        (r"is a damaged gzip file", gzip.compress(b"image_path,caption\na.jpg,A dog.\n", mtime=0)[:-9]),
        (r"is a Git LFS pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n"),
        (r"is an HTML page", b"<!DOCTYPE html><html></html>"),
        (r"is not UTF-8 text: it begins with", b"\x00\x01\x02"),
    ],
)
def test_a_csv_that_cannot_be_read_as_a_whole_stops(tmp_path, message, content):
    with pytest.raises(DataFormatError, match=rf"(?s)c\.csv.*{message}"):
        rows_of(tmp_path / "c.csv", content)


@pytest.mark.parametrize("separator", ["\t", ";"])
def test_a_table_may_be_separated_by_what_its_header_shows(tmp_path, separator):
    table = pd.DataFrame(CAPTIONS, columns=["image_path", "caption"])
    table.to_csv(tmp_path / "captions.tsv", sep=separator)
    assert outcomes(list(CaptionsFile(tmp_path / "captions.tsv"))) == [text for _, text in CAPTIONS]


# --- JSON ------------------------------------------------------------------------------------


def test_json_lines_are_read_one_by_one(tmp_path):
    good = json.dumps({"messages": [{"role": "assistant", "content": "A dog."}], "images": ["a.jpg"]}).encode()
    content = b"\xef\xbb\xbf" + good + b"\n\nno json\n" + good.replace(b"dog", b"caf\xe9") + b"\n7\n" + good
    rows = rows_of(tmp_path / "c.jsonl", content)
    assert outcomes(rows) == ["A dog.", "malformed_row", "bad_encoding", "malformed_row", "A dog."]
    assert [row.row for row in rows] == [1, 2, 3, 4, 5]


def test_a_broken_first_line_does_not_hide_the_others(tmp_path):
    good = json.dumps({"messages": [{"role": "assistant", "content": "A dog."}], "images": ["a.jpg"]})
    assert outcomes(rows_of(tmp_path / "c.jsonl", '{"messages": [\n' + good)) == ["malformed_row", "A dog."]


def test_a_bad_record_of_a_list_is_rejected_alone(tmp_path):
    record = {"id": "x", "image": "a.jpg", "conversations": [{"from": "gpt", "value": "A dog."}]}
    rows = rows_of(tmp_path / "c.json", json.dumps([record, {"id": "y"}, None]))
    assert outcomes(rows) == ["A dog.", "missing_key", "malformed_row"]
    assert rows[1].image_id == "y"


@pytest.mark.parametrize("depth", [101, 900, 200_000])
@pytest.mark.parametrize("form", ["[{}, {}, {}]", "{}\n{}\n{}"])
def test_a_record_nested_without_end_is_rejected_by_its_row_and_the_others_are_kept(tmp_path, form, depth):
    good = json.dumps({"id": "x", "image": "a.jpg", "conversations": [{"from": "gpt", "value": "A dog."}]})
    deep = '{"id": "y", "messages": ' + "[" * depth + "]" * depth + "}"
    rows = rows_of(tmp_path / "c.json", form.replace("{}", "%s") % (good, deep, good))
    assert outcomes(rows) == ["A dog.", "malformed_row", "A dog."]
    assert [row.row for row in rows] == [1, 2, 3]


def test_a_coco_file_nested_without_end_is_refused_in_words(tmp_path):
    write(tmp_path / "c.json", b'{"images": [], "annotations": ' + b"[" * 200_000 + b"]" * 200_000 + b"}")
    with pytest.raises(DataFormatError, match="c.json is nested more than 100 levels deep"):
        list(CaptionsFile(tmp_path / "c.json", tmp_path))


@pytest.mark.parametrize(
    ("message", "content"),
    [
        ("is not valid JSON", '[{"id": 1}'),
        ("is not valid JSON.*contains comments", '[ // mine\n{"id": 1}]'),
        ("is not valid JSON", "[" * 100_000),
        ("is not UTF-8 at byte 2", b'["\xe9"]'),
        ("looks like a COCO file; expected the lists", '{"annotations": 7, "images": []}'),
        ("contains one JSON object with the keys a, which is not a known form", '{\n "a": 1\n}'),
        ("is LLaMA-Factory's dataset_info.json", '{"mine": {"file_name": "mine.json", "formatting": "sharegpt"}}'),
    ],
)
def test_a_json_file_that_cannot_be_read_as_a_whole_stops(tmp_path, message, content):
    with pytest.raises(DataFormatError, match=rf"c\.json {message}"):
        rows_of(tmp_path / "c.json", content)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(MissingArtifactError, match=r"not found: .*none\.csv"):
        list(CaptionsFile(tmp_path / "none.csv"))
    with pytest.raises(MissingArtifactError, match=r"is a folder.*Give a file in it"):
        list(CaptionsFile(tmp_path))
    write(tmp_path / "mine.csv", b"")
    with pytest.raises(MissingArtifactError, match=r"is a folder.*It contains mine\.csv"):
        list(CaptionsFile(tmp_path))


# --- COCO ------------------------------------------------------------------------------------


def coco(folder: Path, annotations: list) -> CaptionsFile:
    tree = {"images": [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "b.jpg"}], "annotations": annotations}
    (folder / "train2014").mkdir(exist_ok=True)
    return CaptionsFile(write(folder / "annotations" / "c.json", json.dumps(tree).encode()), folder / "train2014")


def test_coco_files_give_a_row_per_annotation(tmp_path):
    rows = list(coco(tmp_path, [{"image_id": 2, "caption": " A cat.\n"}, {"image_id": 1, "caption": "A dog."}]))
    caption = (Turn("assistant", " A cat.\n"),)
    assert rows[0] == SourceSample(1, "2", (tmp_path / "train2014" / "b.jpg",), caption, form="coco")
    assert rows[1].id == "1"


@pytest.mark.parametrize(
    ("reason", "annotation"),
    [
        ("missing_key", {"image_id": 1}),
        ("missing_key", "text"),
        ("missing_image", {"image_id": 9, "caption": "A dog."}),
        ("empty_caption", {"image_id": 1, "caption": None}),
        ("empty_caption", {"image_id": 1, "caption": float("nan")}),
        ("malformed_row", {"image_id": 1, "caption": [7]}),
        ("rejected_by_source", {"image_id": 1, "caption": "A dog.", "is_rejected": True}),
        ("malformed_row", {"image_id": [1], "caption": "A dog."}),
    ],
)
def test_bad_annotations_are_rejected_with_their_reason(tmp_path, reason, annotation):
    assert outcomes(list(coco(tmp_path, [annotation]))) == [reason]


def test_coco_without_its_folder_or_lists_stops(tmp_path):
    source = coco(tmp_path, [{"image_id": 1, "caption": "A dog."}])
    with pytest.raises(MissingArtifactError, match=r"a.jpg not found.*image_folder=path/to/train2014"):
        list(CaptionsFile(source.file))
    source.image_folder.rmdir()
    with pytest.raises(MissingArtifactError, match=r"Folder of pictures not found: .*"):
        list(source)


# --- every source alike ----------------------------------------------------------------------


def sources_of_the_same_data(folder: Path) -> dict[str, CaptionsFile]:
    """Ten pictures with two captions each, in every form. Where a form must ask, it asks `COCO Yes:`."""
    pairs = [(f"{seed:02}.jpg", f"Caption {turn} of picture {seed}.") for seed in range(10) for turn in range(2)]
    for seed in range(10):
        write(folder / "pictures" / f"{seed:02}.jpg", jpeg(seed))
    pictures = folder / "pictures"
    pd.DataFrame(pairs, columns=["image_path", "caption"]).to_csv(pictures / "c.csv", index=False)
    forms = {
        "tutorial": [
            {
                "conversations": [
                    {"from": "user", "value": f"COCO Yes: <|vision_start|>{pictures / name}<|vision_end|>"},
                    {"from": "assistant", "value": text},
                ]
            }
            for name, text in pairs
        ],
        "llava": [
            {
                "image": name,
                "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": text}],
            }
            for name, text in pairs
        ],
    }
    forms["bare_path"] = [
        {"conversations": [{"role": "user", "value": name}, {"role": "assistant", "value": text}]}
        for name, text in pairs
    ]
    forms["pandas"] = [{"image_path": name, "caption": text} for name, text in pairs]
    for name, records in forms.items():
        write(pictures / f"{name}.json", json.dumps(records).encode())
    lines = {
        "query": [{"images": [name], "query": "<image>", "response": text} for name, text in pairs],
        "swift": [{"images": [name], "messages": [{"role": "assistant", "content": text}]} for name, text in pairs],
        "openai": [
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": name}}]},
                    {"role": "assistant", "content": text},
                ]
            }
            for name, text in pairs
        ],
    }
    for name, records in lines.items():
        write(pictures / f"{name}.jsonl", "\n".join(map(json.dumps, records)).encode())
    tree = {
        "images": [{"id": seed, "file_name": f"{seed:02}.jpg"} for seed in range(10)],
        "annotations": [{"image_id": int(name[:2]), "caption": text} for name, text in pairs],
    }
    write(folder / "annotations.json", json.dumps(tree).encode())
    names = ["c.csv", *(f"{name}.json" for name in forms), *(f"{name}.jsonl" for name in lines)]
    return {name: CaptionsFile(pictures / name) for name in names} | {
        "coco": CaptionsFile(folder / "annotations.json", pictures)
    }


@pytest.mark.parametrize("override", [False, True])
def test_the_same_data_through_every_source_gives_the_same_conversations_and_split(tmp_path, override):
    results = {}
    for name, source in sources_of_the_same_data(tmp_path).items():
        collected = collect(
            source, workspace_folder(tmp_path), captions_parameters(), image_parameters(), quarantine_parameters(0.0)
        )
        conversations = build_conversations(collected.samples, collected.images, prompt_parameters(override=override))
        split = split_conversations(
            conversations, collected.images, SplitParameters(test_images=3, validation_images=2, seed=1)
        )
        results[name] = (conversations, split)
    assert len(results["coco"][1].test) == 6
    assert all(result == results["c.csv"] for result in results.values())


# --- anything at all -------------------------------------------------------------------------

CELLS = st.text(max_size=12) | st.sampled_from(["a.jpg", "https://x.y/z", "/etc/passwd", '"', ",", "<image>", "nan"])
TABLES = st.lists(st.lists(CELLS, max_size=4), max_size=6).map(
    lambda lines: "image_path,caption\n" + "\n".join(",".join(cells) for cells in lines)
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | CELLS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "id",
                    "image_path",
                    "caption",
                    "query",
                    "response",
                    "history",
                    "system",
                    "conversation",
                    "human",
                    "assistant",
                    "image",
                    "images",
                    "conversations",
                    "messages",
                    "from",
                    "value",
                    "role",
                    "content",
                    "type",
                    "text",
                    "image_url",
                    "url",
                    "x",
                ]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=15,
)
ROLES = st.sampled_from(["user", "human", "gpt", "assistant", "system", "x"])
RECORDS = VALUES | st.fixed_dictionaries(
    {"messages": st.lists(st.fixed_dictionaries({"role": ROLES, "content": VALUES | CELLS}), max_size=3)},
    optional={"images": st.lists(CELLS, max_size=2), "id": VALUES},
)
CONTENTS = (
    TABLES.map(lambda text: text.encode("utf-8", errors="surrogatepass"))
    | st.binary(max_size=100)
    | st.lists(RECORDS, max_size=4).map(lambda records: json.dumps(records).encode())
    | st.lists(RECORDS, min_size=1, max_size=4).map(lambda records: "\n".join(map(json.dumps, records)).encode())
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], deadline=None)
@given(content=CONTENTS)
def test_any_content_is_read_row_by_row_or_refused(tmp_path, content):
    write(tmp_path / "a.jpg", jpeg())
    file = write(tmp_path / "c.any", content)
    with contextlib.suppress(QwenVLLoraError):
        rows = list(CaptionsFile(file))
        numbers = sorted({row.row for row in rows})
        assert numbers == list(range(1, len(numbers) + 1))
        collected = collect(
            rows, workspace_folder(tmp_path), captions_parameters(), image_parameters(), quarantine_parameters()
        )
        assert len(collected.samples) + len(collected.rejected_samples) == len(rows)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(tree=VALUES | st.fixed_dictionaries({"images": st.lists(VALUES), "annotations": st.lists(VALUES, max_size=4)}))
def test_any_coco_file_is_read_row_by_row_or_refused(tmp_path, tree):
    file = write(tmp_path / "c.json", json.dumps(tree).encode())
    with contextlib.suppress(QwenVLLoraError):
        rows = list(CaptionsFile(file, tmp_path))
        if isinstance(tree, dict) and isinstance(tree.get("annotations"), list):
            assert {row.row for row in rows} == set(range(1, len(tree["annotations"]) + 1))


def test_cut_and_flipped_files_are_read_row_by_row_or_refused(tmp_path):
    sources = sources_of_the_same_data(tmp_path)
    rng = random.Random(7)
    originals = {name: source.file.read_bytes() for name, source in sources.items()}
    for _ in range(300):
        name = rng.choice(sorted(sources))
        data = bytearray(originals[name][: rng.randint(1, len(originals[name]))])
        data[rng.randrange(len(data))] = rng.randrange(256)
        sources[name].file.write_bytes(data)
        with contextlib.suppress(QwenVLLoraError):
            list(sources[name])
