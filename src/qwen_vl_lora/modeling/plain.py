"""Handles as plain data and back, so that another process, on another machine too, opens the same things."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from pydantic import BaseModel as PydanticModel

from qwen_vl_lora.exceptions import BaseModelError, LauncherError
from qwen_vl_lora.modeling.base_model import BaseModel
from qwen_vl_lora.ranks import here
from qwen_vl_lora.ranks.launching import portable
from qwen_vl_lora.samples.image_store import ImageEntry, ImageStore

Plain = dict[str, Any]
Settings = TypeVar("Settings")

_KNOWN = ("files", "vision_fingerprint")
"""What of a base model is expensive to find out, and known already."""


def plain_base_model(base_model: BaseModel) -> Plain:
    """Where it is, and what it was when it was hashed."""
    known = {name: getattr(base_model, name) for name in _KNOWN}
    return {"name": base_model.name, "path": portable(base_model.path), "revision": base_model.revision, "known": known}


def base_model_of(plain: Plain) -> BaseModel:
    """The same base model; a further machine hashes its files once more.

    Raises:
        LauncherError: if it is not there.
        BaseModelError: if this machine has other files at its place.
    """
    base_model = BaseModel(plain["name"], Path(plain["path"]), plain["revision"])
    if not base_model.path.is_dir():
        raise LauncherError(
            f"The base model {base_model.path} is not on this machine. Put it below the shared project folder, or at "
            "the same path on every machine."
        )
    if here.is_first_on_a_further_machine() and base_model.files != plain["known"]["files"]:
        raise BaseModelError(
            f"The base model {base_model.path} has other files on this machine than on the run's. Copy it once more."
        )
    base_model.__dict__.update(plain["known"])  # where cached properties keep what they found
    return base_model


def plain_images(images: ImageStore) -> Plain:
    return {"files": portable(images.files), "entries": [list(entry) for entry in images.entries]}


def images_of(plain: Plain) -> ImageStore:
    """The same pictures, without the looks that only splitting needs."""
    files = Path(plain["files"])
    return ImageStore(files, [ImageEntry(*entry) for entry in plain["entries"]], files / "no looks")


def plain_settings(settings: Any) -> Plain:
    """A dataclass of parameter groups."""
    values = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    return {
        name: value.model_dump(mode="json") if isinstance(value, PydanticModel) else value
        for name, value in values.items()
    }


def settings_of(kind: type[Settings], plain: Plain) -> Settings:
    """The same settings, validated again."""
    kinds = get_type_hints(kind)
    return kind(
        **{
            name: kinds[name].model_validate(value)
            if isinstance(kinds[name], type) and issubclass(kinds[name], PydanticModel)
            else value
            for name, value in plain.items()
        }
    )
