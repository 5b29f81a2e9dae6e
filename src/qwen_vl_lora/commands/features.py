"""`qwen-vl-lora features`: list and remove stored image features."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import click

from qwen_vl_lora.commands.prune import places_of
from qwen_vl_lora.exceptions import MissingArtifactError
from qwen_vl_lora.runs.artifacts import relative
from qwen_vl_lora.runs.pruning import recipes, runs_under_way
from qwen_vl_lora.session.console import project_folder, say


@click.group()
def features() -> None:
    """Show and prune stored image features. A run computes missing features again."""


@features.command()
def show() -> None:
    """List what is stored: for each recipe and key the pictures, the size and what the key stands for."""
    for recipe, folder in _key_folders(project_folder()):
        key = json.loads((folder / "key.json").read_text(encoding="utf-8"))
        shards = list(folder.glob("*.safetensors"))
        size = sum(path.stat().st_size for path in shards)
        pixels = (
            f"{key['resized_height']}x{key['resized_width']}"
            if key["resized_height"]
            else f"{key['min_pixels']} to {key['max_pixels']} px"
        )
        say(
            f"{recipe}/{folder.name}: {_count(folder)} pictures, {size / 2**20:.1f} MiB, "
            f"{pixels}, {key['dtype']}, tower {key['vision_fingerprint'][:12]}, {', '.join(key['libraries'])}"
        )


@features.command()
@click.argument("keys", nargs=-1)
@click.option("--yes", is_flag=True, help="Remove. Without this option, only list what would be removed.")
def prune(keys: tuple[str, ...], yes: bool) -> None:
    """Remove the stored features of KEYS, or of all keys."""
    project = project_folder()
    folders = _key_folders(project)
    stored = {folder.name for _, folder in folders}
    unknown = sorted(set(keys) - stored)
    if unknown:
        there = ", ".join(sorted(stored)) or "none"
        raise MissingArtifactError(f"No features are stored under the key {unknown[0]!r}. Stored keys: {there}.")
    for recipe, folder in folders:
        if keys and folder.name not in keys:
            continue
        shown = relative(folder, project)
        busy = runs_under_way(project, recipe)
        if busy:
            say(f"{shown} is kept: run {busy[0]} of {recipe} is still running. Repeat the command when it has ended.")
            continue
        say(f"{'removed' if yes else 'would remove'} {shown}")
        if yes:
            shutil.rmtree(folder)
    if not yes:
        say("Nothing was removed. Add --yes to remove.")


def _key_folders(project: Path) -> list[tuple[str, Path]]:
    """Recipe and folder of every key, of recipes that have run records."""
    stores = [(recipe, places_of(project, recipe)["image_features"]) for recipe in recipes(project)]
    return [(recipe, file.parent) for recipe, store in stores for file in sorted(store.glob("*/key.json"))]


def _count(folder: Path) -> int:
    from qwen_vl_lora.features.store import ImageFeatures

    return len(ImageFeatures(folder))
