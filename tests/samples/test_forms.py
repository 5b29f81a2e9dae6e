"""Every form of captions in which people have them, as a small faithful file: the same twelve through each of them."""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwen_vl_lora.datasets.sources import CaptionsFileDataset
from qwen_vl_lora.exceptions import DataFormatError, QwenVLLoraError
from qwen_vl_lora.parameters import SplitParameters
from qwen_vl_lora.samples.collection import Collected, collect
from qwen_vl_lora.samples.conversations import build_conversations
from qwen_vl_lora.samples.places import open_place
from qwen_vl_lora.samples.source import Source
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

QUESTION = "COCO Yes:"
PAIRS = [(f"{number:02}.jpg", f"Caption of picture {number}.") for number in range(12)]
SIDES = ["train"] * 8 + ["validation"] * 2 + ["test"] * 2
NAMES = dict(zip((name for name, _ in PAIRS), SIDES, strict=True))


def picture(name: str) -> bytes:
    return jpeg(int(name[:2]))


def with_pictures(folder: Path) -> Path:
    for name, _ in PAIRS:
        write(folder / name, picture(name))
    return folder


def as_lines(records: list[Any]) -> bytes:
    return "\n".join(json.dumps(record, ensure_ascii=False) for record in records).encode()


def as_csv(header: list[str], rows: list[list[Any]], delimiter: str = ",") -> bytes:
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter).writerows([header, *rows])
    return text.getvalue().encode()


def table_of(records: list[dict[str, Any]]) -> Any:
    import pyarrow as pa

    return pa.Table.from_pylist(records)


def features() -> Any:
    import datasets

    return datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})


def hf_rows(pairs: list[tuple[str, str]]) -> list[dict[str, Any]]:
    return [{"image": {"bytes": picture(name), "path": name}, "text": text} for name, text in pairs]


# --- tables by other names ------------------------------------------------------------------


def usual_csv(folder: Path) -> Source:
    write(with_pictures(folder) / "captions.csv", as_csv(["image_path", "caption"], [list(pair) for pair in PAIRS]))
    return open_place(str(folder / "captions.csv"))


def csv_in_any_case(folder: Path) -> Source:
    """Kaggle's Flickr8k (https://www.kaggle.com/datasets/adityajn105/flickr8k): image,caption."""
    write(with_pictures(folder) / "captions.txt", as_csv(["Image", "Caption"], [list(pair) for pair in PAIRS]))
    return open_place(str(folder / "captions.txt"))


def csv_of_names_that_were_given(folder: Path) -> Source:
    write(with_pictures(folder / "p") / "x", b"")
    rows = [["x", name, text] for name, text in PAIRS]
    write(folder / "t.csv", as_csv(["note", "Datei", "Beschreibung"], rows))
    columns = {"image": "Datei", "caption": "Beschreibung", "id": None}
    return read_as(open_place(str(folder / "t.csv"), folder / "p"), columns=columns)


def compressed_csv(folder: Path) -> Source:
    """pandas: DataFrame.to_csv("captions.csv.gz")."""
    data = as_csv(["image_path", "caption"], [list(pair) for pair in PAIRS])
    write(with_pictures(folder) / "captions.csv.gz", gzip.compress(data))
    return open_place(str(folder / "captions.csv.gz"))


def workbook(folder: Path) -> Source:
    """Microsoft Excel, written by openpyxl (https://openpyxl.readthedocs.io)."""
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    sheet = book.create_sheet("captions")
    for row in (("image_path", "caption"), *PAIRS):
        sheet.append(row)
    with_pictures(folder)
    book.save(folder / "captions.xlsx")
    return open_place(str(folder / "captions.xlsx"))


def read_as(source: Source, **captions: Any) -> Source:
    from qwen_vl_lora.samples.source import Reading

    return source.read_as(Reading.of(captions_parameters(**captions), image_parameters()))


# --- Hugging Face ---------------------------------------------------------------------------


def imagefolder(folder: Path, name: str, data: bytes) -> Source:
    write(with_pictures(folder) / name, data)
    return open_place(str(folder))


def imagefolder_jsonl(folder: Path) -> Source:
    """https://huggingface.co/docs/datasets/image_dataset#imagefolder"""
    return imagefolder(folder, "metadata.jsonl", as_lines([{"file_name": name, "text": text} for name, text in PAIRS]))


def imagefolder_csv(folder: Path) -> Source:
    return imagefolder(folder, "metadata.csv", as_csv(["file_name", "text"], [list(pair) for pair in PAIRS]))


def imagefolder_parquet(folder: Path) -> Source:
    import pyarrow.parquet as pq

    with_pictures(folder)
    pq.write_table(table_of([{"file_name": name, "text": text} for name, text in PAIRS]), folder / "metadata.parquet")
    return open_place(str(folder))


def imagefolder_of_splits(folder: Path) -> Source:
    """The same page: folder/train/metadata.jsonl, folder/validation/metadata.jsonl, folder/test/metadata.jsonl."""
    for side in dict.fromkeys(SIDES):
        own = [(name, text) for name, text in PAIRS if NAMES[name] == side]
        for name, _ in own:
            write(folder / side / name, picture(name))
        write(folder / side / "metadata.jsonl", as_lines([{"file_name": name, "text": text} for name, text in own]))
    return open_place(str(folder))


def parquet_with_pictures(folder: Path) -> Source:
    """https://huggingface.co/docs/hub/datasets-image#parquet-format, as Dataset.to_parquet writes it."""
    import pyarrow.parquet as pq

    folder.mkdir()
    pq.write_table(table_of(hf_rows(PAIRS)), folder / "captions.parquet")
    return open_place(str(folder / "captions.parquet"))


def parquet_of_splits(folder: Path) -> Source:
    """As the Hugging Face hub keeps tables: data/train-00000-of-00001.parquet."""
    import pyarrow.parquet as pq

    (folder / "data").mkdir(parents=True)
    for side in dict.fromkeys(SIDES):
        own = [pair for pair in PAIRS if NAMES[pair[0]] == side]
        pq.write_table(table_of(hf_rows(own)), folder / "data" / f"{side}-00000-of-00001.parquet")
    return open_place(str(folder))


def arrow_file(folder: Path, kind: str) -> Source:
    """https://arrow.apache.org/docs/python/ipc.html"""
    import pyarrow as pa

    folder.mkdir()
    table = table_of(hf_rows(PAIRS))
    make = pa.ipc.new_file if kind == "file" else pa.ipc.new_stream
    with make(str(folder / "captions.arrow"), table.schema) as writer:
        writer.write_table(table)
    return open_place(str(folder / "captions.arrow"))


def saved_dataset(folder: Path) -> Source:
    """https://huggingface.co/docs/datasets/process#save, by the library itself."""
    import datasets

    datasets.Dataset.from_list(hf_rows(PAIRS), features=features()).save_to_disk(folder)
    return open_place(str(folder))


def saved_dataset_dict(folder: Path) -> Source:
    import datasets

    parts = {
        side: datasets.Dataset.from_list(
            hf_rows([pair for pair in PAIRS if NAMES[pair[0]] == side]), features=features()
        )
        for side in dict.fromkeys(SIDES)
    }
    datasets.DatasetDict(parts).save_to_disk(folder)
    return open_place(str(folder))


# --- shards and sidecars --------------------------------------------------------------------


def write_tar(file: Path, members: list[tuple[str, bytes]], mode: str = "w") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, mode) as archive:  # type: ignore[call-overload]
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return file


def webdataset_text(folder: Path) -> Source:
    """https://github.com/webdataset/webdataset: members of one stem are one sample."""
    for shard in range(2):
        members = [
            member
            for name, text in PAIRS[6 * shard : 6 * shard + 6]
            for member in ((name, picture(name)), (f"{name[:2]}.txt", text.encode()))
        ]
        write_tar(folder / f"{shard:05}.tar", members)
    return open_place(str(folder))


def webdataset_json(folder: Path) -> Source:
    """img2dataset (https://github.com/rom1504/img2dataset): jpg, and json with the caption."""
    members = [
        member
        for name, text in PAIRS
        for member in ((name, picture(name)), (f"{name[:2]}.json", json.dumps({"caption": text, "width": 40}).encode()))
    ]
    return open_place(str(write_tar(folder / "00000.tar.gz", members, "w:gz")))


def sidecars(folder: Path) -> Source:
    """kohya's trainer (https://github.com/kohya-ss/sd-scripts, train_README): a.jpg beside a.caption or a.txt."""
    for number, (name, text) in enumerate(PAIRS):
        write(folder / name, picture(name))
        write(folder / f"{name[:2]}.{'txt' if number % 2 else 'caption'}", f"{text}\nnot a caption\n".encode())
    return open_place(str(folder))


# --- public sets ----------------------------------------------------------------------------


def coco(folder: Path) -> Source:
    """https://cocodataset.org/#format-data, captions."""
    tree = {
        "images": [{"id": int(name[:2]), "file_name": name, "height": 30, "width": 40} for name, _ in PAIRS],
        "annotations": [
            {"id": 100 + int(name[:2]), "image_id": int(name[:2]), "caption": text} for name, text in PAIRS
        ],
    }
    write(with_pictures(folder / "train2014").parent / "captions_train2014.json", json.dumps(tree).encode())
    return open_place(str(folder / "captions_train2014.json"), folder / "train2014")


def karpathy(folder: Path) -> Source:
    """https://cs.stanford.edu/people/karpathy/deepimagesent: dataset_coco.json."""
    images = [
        {
            "filepath": "val2014",
            "filename": name,
            "imgid": number,
            "cocoid": 1000 + number,
            "split": {"validation": "val"}.get(NAMES[name], NAMES[name]),
            "sentids": [number],
            "sentences": [{"tokens": text.lower().split(), "raw": text, "imgid": number, "sentid": number}],
        }
        for number, (name, text) in enumerate(PAIRS)
    ]
    with_pictures(folder / "coco" / "val2014")
    write(folder / "dataset_coco.json", json.dumps({"dataset": "coco", "images": images}).encode())
    return open_place(str(folder / "dataset_coco.json"), folder / "coco")


def textcaps(folder: Path) -> Source:
    """https://textvqa.org/textcaps/dataset: TextCaps_0.1_train.json."""
    data = [
        {"image_id": f"id{number}", "image_path": f"train/{name}", "caption_str": text, "caption_id": number}
        for number, (name, text) in enumerate(PAIRS)
    ]
    with_pictures(folder / "train")
    tree = {"dataset_type": "train", "dataset_name": "TextCaps", "data": data}
    write(folder / "TextCaps_0.1_train.json", json.dumps(tree).encode())
    return open_place(str(folder / "TextCaps_0.1_train.json"))


def flickr8k_token(folder: Path) -> Source:
    """Flickr8k.token.txt of https://github.com/jbrownlee/Datasets/releases/tag/Flickr8k."""
    lines = "".join(f"{name}#0\t{text}\n" for name, text in PAIRS)
    write(with_pictures(folder / "Flicker8k_Dataset").parent / "Flickr8k.token.txt", lines.encode())
    return open_place(str(folder / "Flickr8k.token.txt"), folder / "Flicker8k_Dataset")


def flickr30k_pipes(folder: Path) -> Source:
    """results.csv of https://www.kaggle.com/datasets/hsankesara/flickr-image-dataset."""
    lines = "image_name| comment_number| comment\n" + "".join(f"{name}| 0| {text}\n" for name, text in PAIRS)
    write(with_pictures(folder / "images").parent / "results.csv", lines.encode())
    return open_place(str(folder / "results.csv"), folder / "images")


def flickr30k_lists(folder: Path) -> Source:
    """flickr_annotations_30k.csv of https://huggingface.co/datasets/nlphuji/flickr30k."""
    rows = [
        [json.dumps([text]), json.dumps([0]), NAMES[name], name, number] for number, (name, text) in enumerate(PAIRS)
    ]
    data = as_csv(["raw", "sentids", "split", "filename", "img_id"], rows)
    write(with_pictures(folder / "flickr30k-images").parent / "flickr_annotations_30k.csv", data)
    return open_place(str(folder / "flickr_annotations_30k.csv"), folder / "flickr30k-images")


def chat(text: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": f"{QUESTION} <image>"}, {"from": "gpt", "value": text}]


def llava_pretrain(folder: Path) -> Source:
    """blip_laion_cc_sbu_558k.json of https://huggingface.co/datasets/liuhaotian/LLaVA-Pretrain."""
    records = [{"id": name[:2], "image": f"00001/{name}", "conversations": chat(text)} for name, text in PAIRS]
    with_pictures(folder / "images" / "00001")
    write(folder / "blip_laion_cc_sbu_558k.json", json.dumps(records).encode())
    return open_place(str(folder / "blip_laion_cc_sbu_558k.json"), folder / "images")


def llava_665k(folder: Path) -> Source:
    """llava_v1_5_mix665k.json of https://huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K."""
    records = [{"id": name[:2], "image": f"coco/train2017/{name}", "conversations": chat(text)} for name, text in PAIRS]
    with_pictures(folder / "playground" / "coco" / "train2017")
    write(folder / "llava_v1_5_mix665k.json", json.dumps(records).encode())
    return open_place(str(folder / "llava_v1_5_mix665k.json"), folder / "playground")


def sharegpt4v(folder: Path) -> Source:
    """sharegpt4v_instruct_gpt4-vision_cap100k.json of https://huggingface.co/datasets/Lin-Chen/ShareGPT4V."""
    records = [{"id": name[:2], "image": f"sam/images/{name}", "conversations": chat(text)} for name, text in PAIRS]
    with_pictures(folder / "data" / "sam" / "images")
    write(folder / "sharegpt4v.json", json.dumps(records).encode())
    return open_place(str(folder / "sharegpt4v.json"), folder / "data")


def label_studio(folder: Path) -> Source:
    """https://labelstud.io/guide/export: JSON, a template with a TextArea."""
    tasks = [
        {
            "id": number,
            "data": {"image": name},
            "annotations": [
                {
                    "id": number,
                    "was_cancelled": False,
                    "result": [
                        {"type": "textarea", "from_name": "caption", "to_name": "image", "value": {"text": [text]}}
                    ],
                }
            ],
        }
        for number, (name, text) in enumerate(PAIRS)
    ]
    write(with_pictures(folder) / "project-1.json", json.dumps(tasks).encode())
    return open_place(str(folder / "project-1.json"))


def label_studio_min(folder: Path) -> Source:
    """The same page: JSON_MIN."""
    tasks = [
        {"image": name, "id": number, "caption": text, "annotator": 1, "annotation_id": number, "lead_time": 2.5}
        for number, (name, text) in enumerate(PAIRS)
    ]
    write(with_pictures(folder) / "project-1-min.json", json.dumps(tasks).encode())
    return open_place(str(folder / "project-1-min.json"))


def instruction_and_output(folder: Path) -> Source:
    """Alpaca's keys (https://github.com/tatsu-lab/stanford_alpaca) with images, as LLaMA-Factory's data/README."""
    records = [
        {"instruction": f"{QUESTION} <image>", "input": "", "output": text, "images": [name]} for name, text in PAIRS
    ]
    write(with_pictures(folder) / "alpaca.json", json.dumps(records).encode())
    return open_place(str(folder / "alpaca.json"))


def prompt_and_completion(folder: Path) -> Source:
    """https://huggingface.co/docs/trl/dataset_formats#prompt-completion, with images."""
    records = [
        {
            "images": [name],
            "prompt": [{"role": "user", "content": f"{QUESTION} <image>"}],
            "completion": [{"role": "assistant", "content": text}],
        }
        for name, text in PAIRS
    ]
    write(with_pictures(folder) / "trl.jsonl", as_lines(records))
    return open_place(str(folder / "trl.jsonl"))


def kohya(folder: Path) -> Source:
    """meta_cap.json of https://github.com/kohya-ss/sd-scripts, finetune/merge_captions_to_metadata.py."""
    tree = {str(folder / name): {"caption": text, "train_resolution": [40, 30]} for name, text in PAIRS}
    write(with_pictures(folder) / "meta_cap.json", json.dumps(tree, indent=2).encode())
    return open_place(str(folder / "meta_cap.json"))


def several(folder: Path) -> Source:
    """Two sources of six in one catalog entry."""
    write(with_pictures(folder) / "a.csv", as_csv(["image_path", "caption"], [list(pair) for pair in PAIRS]))
    write(folder / "b.jsonl", as_lines([{"image": name, "text": text} for name, text in PAIRS[6:]]))
    entries = [
        {"name": "first", "filepath": str(folder / "a.csv"), "num_rows": 6},
        str(folder / "b.jsonl"),
    ]
    return CaptionsFileDataset(filepath=entries).load()


FORMS: dict[str, Callable[[Path], Source]] = {
    form.__name__: form
    for form in (
        usual_csv,
        csv_in_any_case,
        csv_of_names_that_were_given,
        compressed_csv,
        workbook,
        imagefolder_jsonl,
        imagefolder_csv,
        imagefolder_parquet,
        imagefolder_of_splits,
        parquet_with_pictures,
        parquet_of_splits,
        saved_dataset,
        saved_dataset_dict,
        webdataset_text,
        webdataset_json,
        sidecars,
        coco,
        karpathy,
        textcaps,
        flickr8k_token,
        flickr30k_pipes,
        flickr30k_lists,
        llava_pretrain,
        llava_665k,
        sharegpt4v,
        label_studio,
        label_studio_min,
        instruction_and_output,
        prompt_and_completion,
        kohya,
        several,
    )
} | {
    "arrow_file": lambda folder: arrow_file(folder, "file"),
    "arrow_stream": lambda folder: arrow_file(folder, "stream"),
}


def gather(source: Source, project: Path, **captions: Any) -> Collected:
    if source.reading.columns is not None:
        captions = {"columns": source.reading.columns.model_dump(), **captions}
    return collect(
        source,
        workspace_folder(project),
        captions_parameters(**captions),
        image_parameters(),
        quarantine_parameters(0.0),
    )


def converse(collected: Collected) -> list[dict[str, Any]]:
    return build_conversations(collected.samples, collected.images, prompt_parameters(user=QUESTION))


def texts(collected: Collected) -> list[str]:
    return [sample["turns"][-1]["text"] for sample in collected.samples]


def by_name(conversations: list[dict[str, Any]]) -> dict[str, Any]:
    """Conversations by their last text, without ids and the file's own splits."""
    return {record["conversations"][-1]["value"]: record["conversations"] for record in conversations}


@pytest.mark.parametrize("form", FORMS)
def test_the_same_twelve_through_every_form_are_the_same_conversations_and_the_same_split(form, tmp_path):
    expected = converse(gather(usual_csv(tmp_path / "usual"), tmp_path / "project"))
    collected = gather(FORMS[form](tmp_path / "form"), tmp_path / "project")
    found = converse(collected)
    assert collected.rejected_samples.empty
    assert by_name(found) == by_name(expected)
    assert len(found) == len(expected) == 12
    split = SplitParameters(test_images=3, validation_images=2, seed=1)
    for side in ("train", "validation", "test"):
        sides = [getattr(split_conversations(records, collected.images, split), side) for records in (found, expected)]
        assert by_name(sides[0]).keys() == by_name(sides[1]).keys()


OWN_SPLITS = (
    "imagefolder_of_splits",
    "parquet_of_splits",
    "saved_dataset_dict",
    "karpathy",
    "flickr30k_lists",
)


@pytest.mark.parametrize("form", OWN_SPLITS)
def test_the_files_own_split_is_honoured(form, tmp_path):
    collected = gather(FORMS[form](tmp_path / "form"), tmp_path, split_column="split")
    assert {sample["turns"][-1]["text"]: sample["split"] for sample in collected.samples} == {
        text: NAMES[name] for name, text in PAIRS
    }
    parts = split_conversations(
        converse(collected), collected.images, SplitParameters(test_images=3, validation_images=2, seed=1)
    )
    assert [len(part) for part in parts[:3]] == [8, 2, 2]


def test_sources_of_one_entry_are_recorded_by_name(tmp_path):
    collected = gather(several(tmp_path / "form"), tmp_path)
    assert [sample["source"] for sample in collected.samples] == ["first"] * 6 + ["b"] * 6
    assert collected.summary["sources"] == {"first": 6, "b": 6}


# --- several captions -----------------------------------------------------------------------


def test_several_captions_of_a_picture_are_each_a_sample_in_every_form_that_has_them(tmp_path):
    two = ["A dog.", "A dog runs."]
    write(tmp_path / "a.jpg", jpeg())
    write(tmp_path / "numbered.csv", as_csv(["image", "caption_0", "caption_1"], [["a.jpg", *two]]))
    write(tmp_path / "list.jsonl", as_lines([{"image": "a.jpg", "captions": two}]))
    write(tmp_path / "cell.csv", as_csv(["image", "captions"], [["a.jpg", str(two)]]))
    sentences = [{"raw": text} for text in two]
    write(tmp_path / "k.json", json.dumps({"images": [{"filename": "a.jpg", "sentences": sentences}]}).encode())
    write(tmp_path / "f.token.txt", "".join(f"a.jpg#{n}\t{text}\n" for n, text in enumerate(two)).encode())
    described = json.dumps({"captions": two}).encode()
    write_tar(tmp_path / "s.tar", [("0.jpg", jpeg()), ("0.json", described)])
    for name in ("numbered.csv", "list.jsonl", "cell.csv", "k.json", "f.token.txt", "s.tar"):
        assert texts(gather(open_place(str(tmp_path / name)), tmp_path)) == two, name


def test_each_line_of_a_text_is_a_caption_where_that_is_asked(tmp_path):
    write(tmp_path / "p" / "a.jpg", jpeg())
    write(tmp_path / "p" / "a.txt", b"A dog.\n\nA dog runs.\n")
    write_tar(tmp_path / "s.tar", [("0.jpg", jpeg()), ("0.txt", b"A dog.\nA dog runs.\n")])
    for place in (tmp_path / "p", tmp_path / "s.tar"):
        assert texts(gather(open_place(str(place)), tmp_path)) == ["A dog."]
        assert texts(gather(open_place(str(place)), tmp_path, sidecar_lines="all")) == ["A dog.", "A dog runs."]


def test_cells_of_metadata_stay_what_they_are(tmp_path):
    """The library datasets reads them by pandas, which makes 42 of 0042, and nothing of NA."""
    write(tmp_path / "a.jpg", jpeg())
    write(tmp_path / "metadata.csv", as_csv(["file_name", "text"], [["a.jpg", "0042"], ["a.jpg", "NA"]]))
    assert texts(gather(open_place(str(tmp_path)), tmp_path, nothing_words="keep")) == ["0042", "NA"]


# --- refused --------------------------------------------------------------------------------


def test_folders_of_classes_are_refused_with_the_reason(tmp_path):
    for name in ("cat", "dog"):
        write(tmp_path / name / "a.jpg", jpeg())
    with pytest.raises(DataFormatError, match="A folder's name is a class, not a caption"):
        open_place(str(tmp_path))


def test_coco_without_its_folder_says_how_to_name_it(tmp_path):
    coco(tmp_path / "form")
    with pytest.raises(FileNotFoundError, match=r"image_folder=path/to/train2014"):
        list(open_place(str(tmp_path / "form" / "captions_train2014.json")))


def test_two_columns_that_could_be_the_caption_are_refused_by_name(tmp_path):
    write(tmp_path / "c.csv", as_csv(["image", "text", "description"], [["a.jpg", "A dog.", "A cat."]]))
    with pytest.raises(DataFormatError, match=r"`text`, `description` can each be the caption.*columns.caption=text"):
        list(open_place(str(tmp_path / "c.csv")))


def test_a_workbook_without_openpyxl_says_what_to_install(tmp_path, monkeypatch):
    import sys
    import zipfile

    with zipfile.ZipFile(tmp_path / "c.xlsx", "w") as archive:
        archive.writestr("xl/workbook.xml", "<workbook/>")
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.raises(
        DataFormatError, match=r"openpyxl, which reads them, is not installed.*pip install -e .\[excel\]"
    ):
        list(open_place(str(tmp_path / "c.xlsx")))


def test_cells_of_a_workbook_are_read_as_they_are_seen(tmp_path):
    openpyxl = pytest.importorskip("openpyxl")
    write(tmp_path / "a.jpg", jpeg())
    book = openpyxl.Workbook()
    book.active.append(["notes only"])
    sheet = book.create_sheet("data")
    for row in (["Image", "Caption", "id"], ["a.jpg", "A dog.", 1.0], [], ["a.jpg", 42, None], ["a.jpg", None, 3]):
        sheet.append(row)
    sheet.append(["a.jpg", "A cat.", None, "too much"])
    book.save(tmp_path / "c.xlsx")
    collected = collect(
        open_place(str(tmp_path / "c.xlsx")),
        workspace_folder(tmp_path),
        captions_parameters(),
        image_parameters(),
        quarantine_parameters(),
    )
    assert texts(collected) == ["A dog.", "42"]
    assert collected.rejected_samples["reason"].tolist() == ["empty_caption", "malformed_row"]


# --- damaged --------------------------------------------------------------------------------

DAMAGED = ("parquet_with_pictures", "arrow_file", "arrow_stream", "saved_dataset", "webdataset_text", "webdataset_json")


@pytest.mark.parametrize("how", ["cut", "flipped", "emptied"])
@pytest.mark.parametrize("form", [*DAMAGED, "compressed_csv", "imagefolder_parquet", "workbook"])
def test_a_damaged_file_gives_one_message_that_names_it(form, how, tmp_path):
    FORMS[form](tmp_path / "form")
    suffixes = (".parquet", ".arrow", ".tar", ".tar.gz", ".csv.gz", ".xlsx")
    file = next(path for path in sorted((tmp_path / "form").rglob("*")) if path.name.endswith(suffixes))
    data = bytearray(file.read_bytes())
    if how == "cut":
        data = data[: len(data) * 2 // 3]
    elif how == "flipped":
        for place in range(8, len(data), 97):
            data[place] ^= 0x55
    else:
        data = data[:4]
    file.write_bytes(data)
    place = tmp_path / "form" if form in ("saved_dataset", "imagefolder_parquet") else file
    with pytest.raises((DataFormatError, FileNotFoundError), match=file.name) as fault:
        gather(open_place(str(place)), tmp_path)
    assert len(str(fault.value)) < 1500


@pytest.mark.parametrize("form", [*DAMAGED, "compressed_csv", "workbook"])
def test_any_damage_of_a_file_is_rows_that_are_read_or_rejected_or_one_message(form, tmp_path):
    import random

    FORMS[form](tmp_path / "form")
    suffixes = (".parquet", ".arrow", ".tar", ".tar.gz", ".csv.gz", ".xlsx")
    file = next(path for path in sorted((tmp_path / "form").rglob("*")) if path.name.endswith(suffixes))
    original, rng = file.read_bytes(), random.Random(form)
    place = tmp_path / "form" if form == "saved_dataset" else file
    for _ in range(40):
        data = bytearray(original[: rng.choice((len(original), rng.randint(1, len(original))))])
        for _ in range(rng.randint(1, 8)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        file.write_bytes(data)
        with contextlib.suppress(QwenVLLoraError):
            rows = {row.row for row in open_place(str(place))}
            assert rows == set(range(1, len(rows) + 1))


@pytest.mark.parametrize("names", [["../other"], ["/etc"], [1], "train", {"train": 1}])
def test_a_saved_dataset_that_names_files_elsewhere_is_refused(names, tmp_path):
    saved_dataset_dict(tmp_path / "form")
    write(tmp_path / "form" / "dataset_dict.json", json.dumps({"splits": names}).encode())
    with pytest.raises(DataFormatError, match="expected the name of a file or folder beside it"):
        open_place(str(tmp_path / "form"))


def test_a_column_whose_name_is_not_utf8_is_one_message(tmp_path):
    arrow_file(tmp_path / "form", "stream")
    file = tmp_path / "form" / "captions.arrow"
    file.write_bytes(file.read_bytes().replace(b"image", b"im\xffge"))
    with pytest.raises(DataFormatError, match=r"captions.arrow cannot be read as Parquet or Arrow"):
        list(open_place(str(file)))


def test_a_tar_that_ends_without_its_end_mark_is_refused(tmp_path):
    file = write_tar(
        tmp_path / "s.tar", [("0.jpg", jpeg()), ("0.txt", b"A dog."), ("1.jpg", jpeg(1)), ("1.txt", b"B.")]
    )
    with tarfile.open(file) as archive:
        cut = archive.getmembers()[2].offset  # at the border of a member, where tarfile itself sees the end
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(DataFormatError, match=r"s.tar cannot be read as a tar"):
        list(open_place(str(file)))


def test_a_bad_row_of_each_is_rejected_alone(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    broken = pa.array([b"A dog.", b"caf\xe9", b"A cat."]).view(pa.string())
    pictures = pa.array([jpeg(1), jpeg(2), b"no picture"])
    pq.write_table(pa.table({"image": pictures, "caption": broken}), tmp_path / "c.parquet")
    members = [
        ("0.jpg", jpeg(1)),
        ("0.txt", b"A dog."),
        ("1.jpg", jpeg(2)),
        ("2.jpg", jpeg(3)),
        ("2.json", b"{"),
        ("3.txt", b"A cat."),
        ("4.jpg", jpeg(4)),
        ("4.txt", b"caf\xe9"),
    ]
    write_tar(tmp_path / "s.tar", members)
    rejected = {}
    for name in ("c.parquet", "s.tar"):
        collected = collect(
            open_place(str(tmp_path / name)),
            workspace_folder(tmp_path),
            captions_parameters(),
            image_parameters(),
            quarantine_parameters(),
        )
        assert texts(collected) == ["A dog."]
        rejected[name] = collected.rejected_samples["reason"].tolist()
    assert rejected == {"c.parquet": ["bad_encoding", "not_an_image"], "s.tar": ["missing_key", *["malformed_row"] * 3]}


# --- streams --------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["tar", "parquet"])
def test_memory_stays_flat_for_many_pictures_in_one_file(form, tmp_path):
    import tracemalloc

    import pyarrow as pa
    import pyarrow.parquet as pq

    big = [jpeg(seed) + bytes([seed]) * 2**20 for seed in range(64)]  # bytes behind the end of a JPEG are allowed
    if form == "tar":
        members = [
            member
            for number, data in enumerate(big)
            for member in ((f"{number:03}.jpg", data), (f"{number:03}.txt", b"A dog."))
        ]
        file = write_tar(tmp_path / "s.tar", members)
    else:
        file = tmp_path / "c.parquet"
        # The library datasets writes groups of 100 rows, of pictures a tenth in size; pyarrow holds one group at most.
        table = pa.table({"image": big, "caption": ["A dog."] * 64})
        pq.write_table(table, file, compression="none", row_group_size=8)
        del table
    del big
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    peak = rows = 0
    for row in open_place(str(file)):
        rows += 1
        peak = max(peak, pa.total_allocated_bytes() - before)
        del row
    traced = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert rows == 64
    assert file.stat().st_size > 64 * 2**20
    assert traced + peak < 48 * 2**20


@pytest.mark.parametrize("form", ["webdataset_text", "parquet_with_pictures"])
def test_a_seeded_sample_and_the_first_rows_of_pictures_in_a_file(form, tmp_path):
    source = FORMS[form](tmp_path / "form")
    first = gather(source, tmp_path, num_rows=4)
    assert texts(first) == [text for _, text in PAIRS[:4]]
    drawn = [texts(gather(source, tmp_path, num_rows=4, sampling="random", seed=seed)) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert all(len(set(part)) == 4 for part in drawn)
