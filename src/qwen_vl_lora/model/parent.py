"""The adapter that a training continues from: find, check, load, and describe it for the new adapter's record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qwen_vl_lora.exceptions import AdapterError, MissingArtifactError
from qwen_vl_lora.model.adapter import PLAIN_STARTS, WEIGHTS_FILE, Adapter
from qwen_vl_lora.model.base_model import BaseModel
from qwen_vl_lora.samples.workspace import Workspace

if TYPE_CHECKING:
    from peft import PeftModel

_MAY_DIFFER = {"lora_dropout"}
"""PEFT's settings that change neither the shapes nor the meaning of the weights."""


@dataclass(frozen=True)
class ParentAdapter:
    """An adapter whose weights a training starts from.

    Attributes:
        place: its directory in the new adapter's record, relative to the project if it is inside.
    """

    place: str
    adapter: Adapter

    @property
    def sha256(self) -> str:
        """Hex sha256 of its weights' file."""
        return self.adapter.weights_sha256

    def describe(self) -> dict[str, Any]:
        """Its entry in the new adapter's record."""
        return {"path": self.place, "sha256": self.sha256, "run": (self.adapter.record.get("run") or {}).get("id")}

    def check_continues(self, base_model: BaseModel, settings: Mapping[str, Any]) -> None:
        """Refuse an adapter whose weights would have another meaning in this training.

        All other settings may differ, such as prompt, picture size and dropout.

        Args:
            settings: of this training, as its adapter's record will state them.

        Raises:
            AdapterError: naming every difference.
            MissingArtifactError: if it has no record.
        """
        record = self.adapter.record
        theirs, ours = _shape(record["lora"]), _shape(settings["lora"])
        pairs = {
            "base model": (record["base_model"]["fingerprint"], base_model.fingerprint),
            "vision": (record["vision"], settings["vision"]),
            **{f"lora.{name}": (theirs.get(name), ours.get(name)) for name in sorted(theirs.keys() | ours.keys())},
        }
        differences = [f"{name}: {old} in the adapter, {new} here" for name, (old, new) in pairs.items() if old != new]
        if differences:
            raise AdapterError(
                f"init_adapter names {self.adapter.path}, which this training cannot continue from. "
                f"{'; '.join(differences)}. Set these to what it was trained with, or init_adapter: null to start anew."
            )

    def load_into(self, model: PeftModel) -> None:
        """Load its weights into a new adapter. The base that `adapter_config.json` names is ignored.

        Raises:
            AdapterError: if the files are refused, or have other tensors than `model`.
        """
        from peft import get_peft_model_state_dict, set_peft_model_state_dict
        from safetensors.torch import load_file

        self.adapter.check_files()
        _ = self.adapter.weights_sha256  # checks every weight, once
        weights = load_file(self.adapter.path / WEIGHTS_FILE)
        wanted = {name: tuple(value.shape) for name, value in get_peft_model_state_dict(model).items()}
        found = {name: tuple(value.shape) for name, value in weights.items()}
        if wanted != found:
            wrong = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
            raise AdapterError(
                f"init_adapter names {self.adapter.path}, whose weights are not those of this training: "
                f"{len(wrong)} tensors differ, the first is {wrong[0]} ({found.get(wrong[0])} in the adapter, "
                f"{wanted.get(wrong[0])} here). Its files are damaged or belong to another base."
            )
        set_peft_model_state_dict(model, weights)


def find_parent(named: str | None, workspace: Workspace) -> ParentAdapter | None:
    """The adapter that `init_adapter` names: a directory below the project, or a version of this recipe's `adapter`.

    Raises:
        MissingArtifactError: with the versions that exist.
        AdapterError: if loading its files could run code.
    """
    if named is None:
        return None
    adapter = find_adapter(named, workspace, "init_adapter")
    return ParentAdapter(place_of(adapter, workspace), adapter)


def find_adapter(named: str, workspace: Workspace, key: str) -> Adapter:
    """The adapter that a parameter names: a directory below the project, or a version of this recipe's `adapter`.

    Args:
        key: of the parameter, for messages.

    Raises:
        MissingArtifactError: with the versions that exist.
        AdapterError: if loading its files could run code.
    """
    project, versions = workspace.project, workspace.adapters
    places = [project / named, versions / named / "adapter"]
    path = next((place for place in places if place.is_dir()), None)
    if path is None:
        there = ", ".join(sorted((place.parent.name for place in versions.glob("*/adapter")), reverse=True)) or "none"
        raise MissingArtifactError(
            f"{key} names {named!r}, which is neither a directory nor a version of {versions} "
            f"(versions found: {there}). Give one of them{', or null to start anew' if key == 'init_adapter' else ''}."
        )
    adapter = Adapter(path)
    adapter.check_files()
    return adapter


def place_of(adapter: Adapter, workspace: Workspace) -> str:
    """Its directory in a record: relative to the project if it is inside."""
    path, project = adapter.path.resolve(), workspace.project.resolve()
    return str(path.relative_to(project) if path.is_relative_to(project) else adapter.path)


def _shape(lora: dict[str, Any]) -> dict[str, Any]:
    """The settings of `lora` that must agree. The order of a list does not matter."""
    kept = {name: value for name, value in lora.items() if name not in _MAY_DIFFER}
    if kept.get("init_lora_weights") in PLAIN_STARTS:  # these values may differ too
        kept.pop("init_lora_weights", None)
    return {name: sorted(value) if isinstance(value, list) else value for name, value in kept.items()}
