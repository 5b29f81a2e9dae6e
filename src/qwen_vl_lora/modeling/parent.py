"""The adapter that a training goes on from: found, checked, loaded, and named in the child's record."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_vl_lora.exceptions import AdapterError, MissingArtifactError
from qwen_vl_lora.modeling.adapter import WEIGHTS_FILE, Adapter
from qwen_vl_lora.modeling.base_model import BaseModel
from qwen_vl_lora.modeling.fingerprints import file_sha256
from qwen_vl_lora.parameters import LoraParameters

if TYPE_CHECKING:
    from peft import PeftModel

_MAY_DIFFER = {"lora_dropout"}
"""Of PEFT's settings, those that change neither the weights' shapes nor what they mean."""

_PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")
"""Of `init_lora_weights`, what leaves the base's weights as they are: between these it may differ too."""


@dataclass(frozen=True)
class ParentAdapter:
    """An adapter whose weights a training starts from.

    Attributes:
        place: its directory as the child's record names it: relative to the project where it lies in it.
    """

    place: str
    adapter: Adapter

    @functools.cached_property
    def sha256(self) -> str:
        """Of its weights."""
        return file_sha256(self.adapter.path / WEIGHTS_FILE)

    def describe(self) -> dict[str, Any]:
        """What the child's record says of it."""
        return {"path": self.place, "sha256": self.sha256, "run": self.adapter.record.get("run", {}).get("id")}

    def check_continues(self, base_model: BaseModel, lora: LoraParameters, vision: str) -> None:
        """Refuse an adapter whose weights would mean something else here.

        Prompt, picture size, dropout and quantization may change: that is what going on is for.

        Raises:
            AdapterError: naming every difference.
            MissingArtifactError: if it has no record.
        """
        record = self.adapter.record
        theirs, ours = _shape(record["lora"]), _shape(lora.model_dump())
        pairs = {
            "base model": (record["base_model"]["fingerprint"], base_model.fingerprint),
            "vision": (record["vision"], vision),
            **{f"lora.{name}": (theirs.get(name), ours.get(name)) for name in sorted(theirs.keys() | ours.keys())},
        }
        differences = [f"{name}: {old} there, {new} here" for name, (old, new) in pairs.items() if old != new]
        if differences:
            raise AdapterError(
                f"init_adapter names {self.adapter.path}, which this training cannot go on from. "
                f"{'; '.join(differences)}. Set these to what it was trained with, or init_adapter: null to start anew."
            )

    def load_into(self, model: PeftModel) -> None:
        """Put its weights into a fresh adapter. What `adapter_config.json` calls its base is never looked for.

        Raises:
            AdapterError: if the files cannot be trusted, or hold other tensors than `model` has.
        """
        from peft import get_peft_model_state_dict, set_peft_model_state_dict
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        self.adapter.check_files()
        try:
            weights = load_file(self.adapter.path / WEIGHTS_FILE)
        except SafetensorError as error:
            raise AdapterError(
                f"init_adapter names {self.adapter.path}, whose weights are damaged: {error}."
            ) from error
        wanted = {name: tuple(value.shape) for name, value in get_peft_model_state_dict(model).items()}
        found = {name: tuple(value.shape) for name, value in weights.items()}
        if wanted != found:
            wrong = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
            raise AdapterError(
                f"init_adapter names {self.adapter.path}, whose weights are not those of this training: "
                f"{len(wrong)} tensors differ, the first is {wrong[0]} ({found.get(wrong[0])} there, "
                f"{wanted.get(wrong[0])} here). Its files are damaged or belong to another base."
            )
        set_peft_model_state_dict(model, weights)


def find_parent(named: str | None, workspace: Path) -> ParentAdapter | None:
    """The adapter that `init_adapter` names: a directory below the project, or a version of this recipe's `adapter`.

    Args:
        workspace: `<project>/data/09_workspace/<recipe>`.

    Raises:
        MissingArtifactError: with the versions there are.
        AdapterError: if its files cannot be loaded without running code.
    """
    if named is None:
        return None
    project = workspace.parents[2]
    versions = workspace.parents[1] / "06_models" / workspace.name / "adapter"
    places = [project / named, versions / named / "adapter"]
    path = next((place for place in places if place.is_dir()), None)
    if path is None:
        there = ", ".join(sorted((place.parent.name for place in versions.glob("*/adapter")), reverse=True)) or "none"
        raise MissingArtifactError(
            f"init_adapter names {named!r}, which is neither a directory nor a version of {versions} "
            f"(versions there: {there}). Give one of them, or null to start anew."
        )
    adapter = Adapter(path)
    adapter.check_files()
    inside = path.resolve().is_relative_to(project.resolve())
    return ParentAdapter(str(path.resolve().relative_to(project.resolve()) if inside else path), adapter)


def _shape(lora: dict[str, Any]) -> dict[str, Any]:
    """Everything of `lora` that must agree; the order of a target list does not matter."""
    kept = {name: value for name, value in lora.items() if name not in _MAY_DIFFER}
    if kept.get("init_lora_weights") in _PLAIN_STARTS:
        kept.pop("init_lora_weights", None)
    return {name: sorted(value) if isinstance(value, list) else value for name, value in kept.items()}
