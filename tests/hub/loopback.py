"""The loopback hub as a fixture, and models and tables to put on it. Import `hub` where a test wants it."""

from __future__ import annotations

import csv
import io
import mmap
import os
from pathlib import Path

import pytest

from hub.server import HubServer

# Read by the client when it is imported: a test of a broken server must not wait half a minute.
os.environ.setdefault("MODELSCOPE_DOWNLOAD_MAX_RETRIES", "1")

MODEL = "Qwen/Qwen2-VL-2B-Instruct"
COCO = "modelscope/coco_2014_caption"

COCO_SCRIPT = """
import csv

import datasets


class Coco(datasets.GeneratorBasedBuilder):
    BUILDER_CONFIGS = [datasets.BuilderConfig(name="coco_2014_caption")]

    def _info(self):
        text = datasets.Value("string")
        columns = {"uniq_id": text, "image_id": text, "caption": text, "image": datasets.Image()}
        return datasets.DatasetInfo(features=datasets.Features(columns))

    def _split_generators(self, dl_manager):
        path = dl_manager.download("train.csv")
        return [datasets.SplitGenerator(name="train", gen_kwargs={"path": path})]

    def _generate_examples(self, path):
        with open(path, encoding="utf-8", newline="") as lines:
            for number, row in enumerate(csv.DictReader(lines)):
                yield number, row
"""
"""A script dataset as the hub has it: texts in the repository, pictures by address on other storage."""


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub on loopback; the client's endpoint and cache are all that differs from a user's machine."""
    with HubServer() as server:
        for name, value in hub_environment(server, tmp_path).items():
            monkeypatch.setenv(name, value)
        yield server


def hub_environment(server: HubServer, folder: Path) -> dict[str, str]:
    return {
        "MODELSCOPE_ENDPOINT": server.endpoint,
        "MODELSCOPE_CACHE": str(folder / "cache"),
        "MODELSCOPE_HOME": str(folder / "home"),
        "HF_HOME": str(folder / "huggingface"),
        "HF_HUB_OFFLINE": "0",  # MsDataset's library asks it before it asks ModelScope
    }


def files_of(folder: Path) -> dict[str, bytes]:
    """A model's directory as a repository."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def mapped_files_of(folder: Path) -> dict[str, memoryview]:
    """`files_of` for a model of gigabytes: its files are read from the disk when they are asked for."""
    mapped = {}
    for path in folder.iterdir():
        with path.open("rb") as file:
            mapped[path.name] = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    return mapped


def add_coco(
    hub: HubServer,
    pictures: list[bytes],
    captions: list[str] | None = None,
    *,
    dataset: str = COCO,
    table: str = "train.csv",
) -> None:
    """The dataset of the COCO recipe, a row for each picture."""
    lines = io.StringIO()
    rows = csv.writer(lines)
    rows.writerow(["uniq_id", "image_id", "caption", "image"])
    for number, picture in enumerate(pictures):
        name = f"train2014/COCO_{number:012}.jpg"
        hub.storage[name] = picture
        caption = captions[number] if captions else f" A picture,  number {number}.\n"
        rows.writerow([number, f"COCO_{number:012}", caption, f"{hub.endpoint}/storage/{name}"])
    script = {f"{dataset.partition('/')[2]}.py": COCO_SCRIPT.replace("train.csv", table)}
    files = {**script, "README.md": "# COCO\n", table: lines.getvalue()}
    hub.add_dataset(dataset, {name: text.encode() for name, text in files.items()})
