"""Every entry of the catalog that can be saved, with values for it, and places to die during a save."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import signal
from pathlib import Path

from kedro.config import OmegaConfigLoader
from kedro.io import DataCatalog

from qwen_vl_lora.settings import CONFIG_LOADER_ARGS

PROJECT = Path(__file__).parents[2]
MOMENTS = ("cut", "written", "renaming", "renamed")
READ_ONLY = {"captioned_images", "base_model", "workspace"}
FEATURES = "image_features"


@functools.cache
def catalog_text() -> str:
    """Every entry of conf/*/catalog.yml as JSON; the factory entry stands for one split.

    What a recipe has otherwise than the default stands beside it, under `<recipe>__<name>`.
    """
    recipes = sorted(path.parent.name for path in (PROJECT / "conf").glob("*/catalog*.yml"))
    entries: dict[str, dict] = {}
    for recipe in ["base", *(recipe for recipe in recipes if recipe != "base")]:
        config = OmegaConfigLoader(str(PROJECT / "conf"), env=recipe, **CONFIG_LOADER_ARGS)["catalog"]
        for name, entry in config.items():
            stored = {key: _without_recipe(value, recipe) for key, value in entry.items()}
            if recipe == "base":
                entries[name] = stored
            elif entries.get(name) != stored:
                entries[f"{recipe}__{name}"] = stored
    return json.dumps(entries).replace("{split}", "train")


def _without_recipe(value, recipe: str):
    """Folders are named after the recipe, in each one."""
    if not isinstance(value, str):
        return value
    return "/".join("tiny" if part == recipe else part for part in value.split("/"))


def catalog_config() -> dict:
    return json.loads(catalog_text())


def is_read_only(name: str) -> bool:
    return name.rpartition("__")[2] in READ_ONLY


def entries_of_each_type() -> list[str]:
    """The first writable entry of each dataset type, stock types behind `ArtifactDataset` included."""
    first: dict[tuple, str] = {}
    for name, entry in catalog_config().items():
        if not is_read_only(name):
            stock = entry.get("dataset")
            kind = stock["type"] if isinstance(stock, dict) else stock
            first.setdefault((entry["type"], kind, entry.get("versioned", False)), name)
    return list(first.values())


def open_entry(folder: Path, name: str, version: str | None = None):
    """The entry's dataset in a data folder of its own, saving as `version`."""
    entry = catalog_config()[name]
    if entry.get("filepath") is not None:
        entry["filepath"] = str(folder / entry["filepath"])
    return DataCatalog.from_config({name: entry}, save_version=version).get(name)


def value_for(name: str, folder: Path, which: str):
    """Something that the entry can save."""
    entry = catalog_config()[name]
    kind = entry["type"].rpartition(".")[2]
    if kind == "ArtifactDataset":
        stock = entry["dataset"]
        return _stock_value(
            (stock if isinstance(stock, str) else stock["type"]).rpartition(".")[2], entry["dataset"], which
        )
    return {
        "ImageTableDataset": _pictures,
        "ModelDirectoryDataset": _staged_folder,
        "AdapterCardDataset": _staged_folder,
        "ImageFeaturesDataset": _shards,
    }[kind](folder, which)


def _stock_value(kind: str, config, which: str):
    import pandas as pd
    import plotly.graph_objects as go
    from PIL import Image

    if kind == "JSONDataset" and "plotly" in str(config):
        return go.Figure(go.Scatter(y=[1, 2], name=which))
    return {
        "JSONDataset": [{"which": which}] * 20,
        "RecordsDataset": [{"which": which}] * 20,
        "CSVDataset": pd.DataFrame({"which": [which] * 20}),
        "SpreadsheetCSVDataset": pd.DataFrame({"caption": [which] * 20}),
        "PictureDataset": Image.new("RGB", (64, 64), {"old": "red", "new": "blue"}[which]),
        "ReportDataset": f"<html>{which}</html>" * 20,
    }[kind]


def _pictures(folder: Path, which: str):
    from qwen_vl_lora.samples.collection import collect
    from qwen_vl_lora.samples.records import SourceSample, Turn
    from samples.pictures import captions_parameters, image_parameters, jpeg, quarantine_parameters, workspace_folder

    seeds = {"old": (1, 2), "new": (2, 3)}[which]
    rows = [SourceSample(seed, f"i{seed}", (jpeg(seed),), (Turn("assistant", "A dog."),)) for seed in seeds]
    parameters = captions_parameters(), image_parameters(), quarantine_parameters()
    return collect(rows, workspace_folder(folder), *parameters).images


def _staged_folder(folder: Path, which: str) -> Path:
    staged = folder / "data" / "09_workspace" / f"staged-{os.getpid()}-{which}"
    staged.mkdir(parents=True)
    for name in ("adapter_model.safetensors", "adapter_record.json", "adapter_config.json"):
        (staged / name).write_text(json.dumps({"which": which * 20}))
    return staged


def _shards(folder: Path, which: str):
    from qwen_vl_lora.features.key import FeatureKey
    from qwen_vl_lora.features.store import StagedShards

    staging = folder / "data" / "09_workspace" / "features"
    staging.mkdir(parents=True, exist_ok=True)
    paths = []
    for number in range(2):
        data = f"{which}-{number}".encode() * 100
        path = staging / f"{hashlib.sha256(data).hexdigest()}.safetensors"
        path.write_bytes(data)
        paths.append(path)
    key = FeatureKey("tower", 112, 112, None, None, "float32", ("torch==1",))
    return StagedShards(key, tuple(paths))


def content(path: Path) -> dict[str, bytes]:
    """Bytes of a file, or of everything in a folder."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return {file.name: file.read_bytes() for file in files}


def die(*arguments, **options):
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(moment: str) -> None:
    """Cut written files in half; die before they reach the disk, before the rename, or after it."""
    from qwen_vl_lora.datasets import artifacts

    if moment == "cut":

        def cut(staging: Path) -> None:
            for file in (p for p in staging.rglob("*") if p.is_file()):
                os.truncate(file, file.stat().st_size // 2)
            die()

        artifacts.sync_tree = cut
    elif moment == "written":
        artifacts.sync_tree = die
    elif moment == "renaming":
        artifacts._publish_version = artifacts.replace = die
    else:
        publish, replace = artifacts._publish_version, artifacts.replace
        artifacts._publish_version = lambda *paths: (publish(*paths), die())
        artifacts.replace = lambda *paths: (replace(*paths), die())


def die_between_shards(moment: str) -> None:
    renamed, rename = [0], Path.replace

    def counted(self, target):
        if self.suffix == ".safetensors":
            if renamed[0] == MOMENTS.index(moment) - 1:  # before the first, after the first, after the second
                die()
            renamed[0] += 1
        result = rename(self, target)
        if renamed[0] == 2:
            die()
        return result

    Path.replace = counted


def save(order: dict) -> None:
    folder = Path(order["folder"])
    os.chdir(folder)
    dataset = open_entry(folder, order["entry"], order["version"])
    value = value_for(order["entry"], folder, order["which"])
    if order["moment"]:
        (die_between_shards if order["entry"] == FEATURES else die_at)(order["moment"])
    dataset.save(value)
