"""A trained adapter on disk, with the record of what made it."""

from __future__ import annotations

import functools
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_vl_lora.exceptions import AdapterError, MissingArtifactError
from qwen_vl_lora.faults import machine_fault
from qwen_vl_lora.modeling.base_model import BaseModel
from qwen_vl_lora.modeling.lora import peft_without_noise
from qwen_vl_lora.parameters import ImageParameters, PromptParameters

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

RECORD_FILE = "adapter_record.json"
PICTURE_SIZE = ("resized_height", "resized_width", "min_pixels", "max_pixels")
_CONFIG = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"


@dataclass(frozen=True)
class Adapter:
    """A PEFT directory with `adapter_record.json`."""

    path: Path

    @functools.cached_property
    def record(self) -> dict[str, Any]:
        """What made this adapter, and how it wants to be asked.

        Raises:
            MissingArtifactError: if the directory was not written by this project.
            AdapterError: if the record is no JSON object.
        """
        try:
            return self._read_json(RECORD_FILE)
        except FileNotFoundError as error:
            raise MissingArtifactError(
                f"Adapter {self.path} has no {RECORD_FILE}, so base model, prompt and image size are unknown. "
                "Use an adapter that this project trained."
            ) from error

    @property
    def picture_size(self) -> dict[str, int | None]:
        """The part of the `image` block that says how large pictures were in training."""
        return {name: self.record["image"][name] for name in PICTURE_SIZE}

    def check_base(self, base_model: BaseModel) -> None:
        """Refuse another base than the one that the adapter was trained on.

        Raises:
            AdapterError: with both fingerprints and the name of the right base.
        """
        trained = self.record["base_model"]
        if trained["fingerprint"] != base_model.fingerprint:
            name = trained.get("name", "the base that it was trained on")
            raise AdapterError(
                f"Adapter {self.path} does not fit the base model: trained with {trained['fingerprint']} ({name}), "
                f"configured {base_model.fingerprint} ({base_model.name}). On another base it means nothing: "
                f'--params "base_model={name}", or pin the adapter version that fits: --load-versions "adapter:…".'
            )

    @property
    def quantization(self) -> str | None:
        """Bits of the base in training."""
        name: str | None = self.record.get("quantization")
        return name

    def check_settings(
        self, prompt: PromptParameters, image: ImageParameters, vision: str, quantization: str | None
    ) -> None:
        """Refuse another prompt, picture size, tower or quantization than in training. Limits on files may differ.

        Raises:
            AdapterError: naming every difference: record against configuration.
        """
        pairs = {
            "prompt": (self.record["prompt"], prompt.model_dump()),
            "image": (self.picture_size, image.model_dump(include=set(PICTURE_SIZE))),
            "vision": (self.record["vision"], vision),
            "quantization": (self.quantization, quantization),
        }
        differences = [
            f"{name}: trained with {theirs}, configured {ours}"
            for name, (theirs, ours) in pairs.items()
            if theirs != ours
        ]
        if differences:
            raise AdapterError(
                f"Adapter {self.path} does not fit the configuration. {'; '.join(differences)}. "
                "Set the parameters to what it was trained with; or take its own: scoring.settings_from=adapter in "
                "evaluation, inference.settings_from=adapter in inference; or pin the adapter version that fits: "
                '--load-versions "adapter:…".'
            )

    def attach(self, model: PreTrainedModel) -> PeftModel:
        """The base model with this adapter around it. `model` must be freshly loaded.

        The base is the one that is given: what `adapter_config.json` calls its base is never looked for.

        Raises:
            AdapterError: if the files are not what `check_files` wants, or do not belong to `model`.
        """
        from peft import PeftModel
        from safetensors import SafetensorError

        self.check_files()
        with peft_without_noise():
            # PEFT only warns of weights that find no place, and the adapter would silently do nothing.
            warnings.filterwarnings("error", message=".*missing adapter keys", category=UserWarning)
            try:
                return PeftModel.from_pretrained(model, self.path, local_files_only=True).eval()
            except (SafetensorError, RuntimeError, TypeError, ValueError, UserWarning) as error:
                if machine_fault(error) is not None:
                    raise
                raise AdapterError(
                    f"Adapter {self.path} cannot be loaded: {str(error)[:300]} Its files are damaged or belong to "
                    "another base. Pin another version (--load-versions), or train again."
                ) from error

    def check_files(self) -> None:
        """Whether the files can be loaded without running or reading anything from outside. Reads no weights.

        Raises:
            AdapterError: if the weights are no safetensors, a file is a link that leads outside, or the
                configuration is of another kind than LoRA or names code.
        """
        if not (self.path / WEIGHTS_FILE).is_file():
            raise AdapterError(
                f"Adapter {self.path} lacks {WEIGHTS_FILE}; adapters stored as pickles can run code and are refused."
            )
        for name in (_CONFIG, WEIGHTS_FILE, RECORD_FILE):
            place = (self.path / name).resolve()
            if place.parent != self.path.resolve():
                raise AdapterError(f"Adapter {self.path}: {name} leads outside, to {place}. Copy the file itself here.")
        config = self._read_json(_CONFIG)
        if config.get("peft_type") != "LORA":
            raise AdapterError(
                f"Adapter {self.path} is of peft_type {config.get('peft_type')!r}; LORA is required. Other kinds may "
                "load more models than the base."
            )
        if config.get("megatron_config") is not None:
            raise AdapterError(
                f"Adapter {self.path} names a module for PEFT to import (megatron_config in {_CONFIG}), which is never "
                "done here. Set it to null if you trust the rest."
            )

    def _read_json(self, name: str) -> dict[str, Any]:
        path = self.path / name
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise AdapterError(f"{path} is no JSON: {error}. Take another version of the adapter.") from error
        if not isinstance(content, dict):
            raise AdapterError(f"{path} must hold a JSON object; came {type(content).__name__}.")
        return content


def note_run(directory: Path, run: dict[str, Any]) -> None:
    """Add the run that made the adapter to its record."""
    file = directory / RECORD_FILE
    record = {**json.loads(file.read_text(encoding="utf-8")), "run": run}
    file.write_text(json.dumps(record, indent=2, ensure_ascii=False), encoding="utf-8")
