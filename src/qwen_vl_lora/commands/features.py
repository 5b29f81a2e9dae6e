"""`qwen-vl-lora features`: what is stored of pictures, and removing it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import click

from qwen_vl_lora.console import project_folder
from qwen_vl_lora.exceptions import MissingArtifactError
from qwen_vl_lora.lineage.pruning import runs_under_way


@click.group()
def features() -> None:
    """Show and prune stored image features. They are remade whenever they are missing."""


@features.command()
def show() -> None:
    """List what is stored: for each recipe and key the pictures, the size and what the key stands for."""
    for folder in _key_folders():
        key = json.loads((folder / "key.json").read_text(encoding="utf-8"))
        shards = list(folder.glob("*.safetensors"))
        size = sum(path.stat().st_size for path in shards)
        pixels = (
            f"{key['resized_height']}x{key['resized_width']}"
            if key["resized_height"]
            else f"{key['min_pixels']} to {key['max_pixels']} px"
        )
        click.echo(
            f"{folder.parents[1].name}/{folder.name}: {_count(folder)} pictures, {size / 2**20:.1f} MiB, "
            f"{pixels}, {key['dtype']}, tower {key['vision_fingerprint'][:12]}, {', '.join(key['libraries'])}"
        )


@features.command()
@click.argument("keys", nargs=-1)
@click.option("--yes", is_flag=True, help="Remove; without it only what would be removed is shown.")
def prune(keys: tuple[str, ...], yes: bool) -> None:
    """Remove the stored features of KEYS, or of all keys."""
    project = project_folder()
    folders = _key_folders()
    unknown = sorted(set(keys) - {folder.name for folder in folders})
    if unknown:
        there = ", ".join(sorted({folder.name for folder in folders})) or "none"
        raise MissingArtifactError(f"No features are stored under the key {unknown[0]!r}. Keys there are: {there}.")
    for folder in folders:
        if keys and folder.name not in keys:
            continue
        recipe, shown = folder.parents[1].name, folder.relative_to(project)
        busy = runs_under_way(project, recipe)
        if busy:
            click.echo(f"{shown} stays: run {busy[0]} of {recipe} is under way. Call again when it has ended.")
            continue
        click.echo(f"{'removed' if yes else 'would remove'} {shown}")
        if yes:
            shutil.rmtree(folder)
    if not yes:
        click.echo("Nothing was removed; add --yes to do it.")


def _key_folders() -> list[Path]:
    found = (project_folder() / "data/04_feature").glob("*/image_features/*/key.json")
    return sorted(path.parent for path in found)


def _count(folder: Path) -> int:
    from qwen_vl_lora.features.store import ImageFeatures

    return len(ImageFeatures(folder))
