"""A trained adapter on disk, with the record of what made it."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_vl_lora.exceptions import AdapterError, MissingArtifactError
from qwen_vl_lora.modeling.base_model import BaseModel
from qwen_vl_lora.modeling.lora import peft_without_noise
from qwen_vl_lora.parameters import ImageParameters, PromptParameters

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

RECORD_FILE = "adapter_record.json"
_WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Adapter:
    """A PEFT directory with `adapter_record.json`."""

    path: Path

    @functools.cached_property
    def record(self) -> dict[str, Any]:
        """What made this adapter, and how it wants to be asked.

        Raises:
            MissingArtifactError: if the directory was not written by this project.
        """
        try:
            record: dict[str, Any] = json.loads((self.path / RECORD_FILE).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise MissingArtifactError(
                f"Adapter {self.path} has no {RECORD_FILE}, so base model, prompt and image size are unknown. "
                "Use an adapter that this project trained."
            ) from error
        return record

    def check_fits(self, base_model: BaseModel, prompt: PromptParameters, image: ImageParameters) -> None:
        """Refuse an adapter that was trained on another base, prompt or image size than the configured.

        Raises:
            AdapterError: naming every difference: record against configuration.
        """
        sizes = {"resized_height", "resized_width", "min_pixels", "max_pixels"}
        pairs = {
            "base model": (self.record["base_model"]["fingerprint"], base_model.fingerprint),
            "prompt": (self.record["prompt"], prompt.model_dump()),
            "image": (
                {name: self.record["image"][name] for name in sorted(sizes)},
                {name: image.model_dump()[name] for name in sorted(sizes)},
            ),
        }
        differences = [
            f"{name}: trained with {theirs}, configured {ours}"
            for name, (theirs, ours) in pairs.items()
            if theirs != ours
        ]
        if differences:
            raise AdapterError(
                f"Adapter {self.path} does not fit the configuration. {'; '.join(differences)}. "
                "Set the parameters to what it was trained with, or pin the adapter version that fits: "
                '--load-versions "adapter:…".'
            )

    def attach(self, model: PreTrainedModel) -> PeftModel:
        """The base model with this adapter around it. `model` must be freshly loaded.

        Raises:
            AdapterError: if the weights are not in safetensors form.
        """
        from peft import PeftModel

        if not (self.path / _WEIGHTS).is_file():
            raise AdapterError(
                f"Adapter {self.path} lacks {_WEIGHTS}; adapters stored as pickles can run code and are refused."
            )
        with peft_without_noise():
            return PeftModel.from_pretrained(model, self.path, local_files_only=True).eval()


def note_run(directory: Path, run: dict[str, Any]) -> None:
    """Add the run that made the adapter to its record."""
    file = directory / RECORD_FILE
    record = {**json.loads(file.read_text(encoding="utf-8")), "run": run}
    file.write_text(json.dumps(record, indent=2, ensure_ascii=False), encoding="utf-8")
