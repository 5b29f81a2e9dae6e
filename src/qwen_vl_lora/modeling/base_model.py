"""The base model on disk: what it is, whether it can be used, and how it is loaded.

Imports torch and transformers only when weights or the processor are asked for.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_vl_lora.exceptions import BaseModelError, MissingArtifactError
from qwen_vl_lora.modeling.fingerprints import VISION_TENSOR, files_sha256, stored_tensors, vision_sha256

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, ProcessorMixin

FAMILIES = ("qwen2_vl", "qwen2_5_vl")
"""`model_type` of the families that are tested."""

# What a prediction depends on besides the weights.
_SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class BaseModel:
    """A read-only handle on a base model's directory. Weights load on demand.

    Attributes:
        name: what the configuration calls it, a path or a hub id.
        path: directory with config, processor files and safetensors.
        revision: hub revision, or None for a plain directory.
    """

    name: str
    path: Path
    revision: str | None = None

    def check(self) -> None:
        """Whether the directory can be used at all. Cheap: reads no weights.

        Raises:
            MissingArtifactError: if the directory or a file in it is not there.
            BaseModelError: if it asks for remote code, holds only pickles or is of another family.
        """
        if not self.path.is_dir():
            raise MissingArtifactError(
                f"Base model {self.path} is not there. Give a directory with config.json and *.safetensors "
                '(--params "base_model=…"), or build the tiny one: kedro run --pipeline base_model.'
            )
        if "auto_map" in self.config:
            raise BaseModelError(
                f"Base model {self.path} asks for its own code (auto_map in config.json), which is never run here. "
                "Use a checkpoint of the plain Qwen2-VL or Qwen2.5-VL architecture."
            )
        if self.family not in FAMILIES:
            raise BaseModelError(
                f"Base model {self.path} is of family {self.family!r}; supported: {', '.join(FAMILIES)}."
            )
        for path in self.weight_files:
            if not path.is_file():
                raise MissingArtifactError(f"Base model {self.path} lacks {path.name}. Fetch the model again.")

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """config.json as it stands."""
        path = self.path / "config.json"
        try:
            config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise MissingArtifactError(f"Base model {self.path} lacks config.json; is it a model directory?") from error
        except ValueError as error:
            raise BaseModelError(f"{path} is no JSON: {error}. Fetch the model again.") from error
        return config

    @property
    def family(self) -> str:
        return str(self.config.get("model_type"))

    @functools.cached_property
    def weight_files(self) -> list[Path]:
        """The safetensors files, by the index where there is one.

        Raises:
            BaseModelError: if only pickle files are there.
        """
        index = self.path / "model.safetensors.index.json"
        if index.is_file():
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            return [self.path / name for name in sorted(names)]
        files = sorted(self.path.glob("*.safetensors"))
        if files:
            return files
        pickles = sorted(path.name for path in [*self.path.glob("*.bin"), *self.path.glob("*.pt*")])
        if pickles:
            raise BaseModelError(
                f"Base model {self.path} holds only pickle files ({', '.join(pickles)}), which can run code when "
                "loaded. Convert it to safetensors or take a checkpoint that has them."
            )
        raise MissingArtifactError(f"Base model {self.path} holds no *.safetensors. Fetch the model again.")

    @functools.cached_property
    def files(self) -> dict[str, str]:
        """File name → sha256 of everything a prediction depends on."""
        side_files = [self.path / name for name in _SIDE_FILES]
        return files_sha256([*(path for path in side_files if path.is_file()), *self.weight_files])

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hex sha256 over `files`."""
        return digest(self.files)

    @functools.cached_property
    def vision_fingerprint(self) -> str:
        """Hex sha256 of all that turns a picture into features: vision weights, their config, the preprocessor."""
        preprocessor = {name: value for name, value in self.files.items() if name.endswith("processor_config.json")}
        return digest([vision_sha256(self.weight_files), self.config["vision_config"], preprocessor])

    def load_processor(self) -> ProcessorMixin:
        """Tokenizer, image processor and chat template.

        Raises:
            BaseModelError: if tokenizer and model disagree on the image token: such a pair
                trains without ever seeing a picture.
        """
        from transformers import AutoProcessor

        processor = AutoProcessor.from_pretrained(self.path, local_files_only=True)
        token = processor.image_token
        token_id = processor.tokenizer.convert_tokens_to_ids(token)
        if token_id != self.config.get("image_token_id"):
            raise BaseModelError(
                f"{self.path}: the tokenizer's image token {token!r} is id {token_id}, but config.json says "
                f"image_token_id {self.config.get('image_token_id')}. The files do not belong together."
            )
        return processor

    def load_model(self, dtype: str, device: torch.device | str, **arguments: Any) -> PreTrainedModel:
        """The whole model in evaluation mode, on one device, nothing trainable.

        Args:
            dtype: `bfloat16`, `float16` or `float32`.
            device: where to put it.
            **arguments: passed to `from_pretrained`.
        """
        import torch
        from transformers import AutoModelForImageTextToText

        model = AutoModelForImageTextToText.from_pretrained(
            self.path,
            dtype=getattr(torch, dtype),
            local_files_only=True,
            **{"attn_implementation": "sdpa", **arguments},
        )
        return model.to(device).eval().requires_grad_(False)

    def load_vision_tower(self, dtype: str, device: torch.device | str) -> PreTrainedModel:
        """The vision tower alone, so that encoding never holds the language model in memory."""
        import torch
        from safetensors import safe_open
        from transformers import AutoConfig, AutoModelForImageTextToText

        config = AutoConfig.from_pretrained(self.path, local_files_only=True)
        with torch.device("meta"):
            tower_class = type(AutoModelForImageTextToText.from_config(config).model.visual)
        tower = tower_class._from_config(config.vision_config, attn_implementation="sdpa", dtype=getattr(torch, dtype))
        weights = {}
        for path in self.weight_files:
            with safe_open(path, framework="pt") as file:
                for tensor in stored_tensors(path):
                    if VISION_TENSOR.match(tensor.name):
                        weights[VISION_TENSOR.sub("", tensor.name)] = file.get_tensor(tensor.name)
        tower.load_state_dict(weights, strict=True)
        return tower.to(device).eval().requires_grad_(False)


def digest(value: Any) -> str:
    """Hex sha256 of a JSON-able value, whatever the order of its keys."""
    import hashlib

    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
