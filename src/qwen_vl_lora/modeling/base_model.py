"""The base model on disk: what it is, whether it can be used, and how it is loaded.

Imports torch and transformers only when weights or the processor are asked for.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_vl_lora.exceptions import BaseModelError, MissingArtifactError
from qwen_vl_lora.modeling.devices import check_attention
from qwen_vl_lora.modeling.fingerprints import VISION_TENSOR, files_sha256, stored_tensors, vision_sha256
from qwen_vl_lora.modeling.quantization import check_quantization, check_what_is_quantized, quantization_config

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


_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_ATTENTION_KEYS = ("attn_implementation", "_attn_implementation")


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
        self._check_asks_for_no_code()
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
        try:
            return self._read_json("config.json")
        except FileNotFoundError as error:
            raise MissingArtifactError(f"Base model {self.path} lacks config.json; is it a model directory?") from error

    def _check_asks_for_no_code(self) -> None:
        names = [name for name in _SIDE_FILES if name.endswith("config.json") and (self.path / name).is_file()]
        for name in ["config.json", *names]:
            content = self.config if name == "config.json" else self._read_json(name)
            for key, value in _entries(content):
                # An attention given as owner/name is compiled code that transformers fetches from a hub.
                if key == "auto_map" or (key in _ATTENTION_KEYS and "/" in str(value)):
                    raise BaseModelError(
                        f"Base model {self.path} asks for its own code ({key} in {name}), which is never run here. "
                        "Use a checkpoint of the plain Qwen2-VL or Qwen2.5-VL architecture."
                    )

    def _read_json(self, name: str) -> dict[str, Any]:
        path = self.path / name
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise BaseModelError(f"{path} is no JSON: {error}. Fetch the model again.") from error
        if not isinstance(content, dict):
            raise BaseModelError(f"{path} must hold a JSON object; came {type(content).__name__}. Fetch it again.")
        return content

    @property
    def family(self) -> str:
        return str(self.config.get("model_type"))

    @functools.cached_property
    def weight_files(self) -> list[Path]:
        """The safetensors files that transformers loads: the one file, or those of the index.

        Raises:
            BaseModelError: if only pickle files are there, or the index names files elsewhere.
        """
        if (self.path / _WEIGHTS).is_file():
            return [self.path / _WEIGHTS]
        if (self.path / _INDEX).is_file():
            return self._indexed_files()
        others = sorted(path.name for path in self.path.glob("*.safetensors"))
        if others:
            raise BaseModelError(
                f"Base model {self.path} has neither {_WEIGHTS} nor {_INDEX}, which say what to load; there are "
                f"{', '.join(others)}. Fetch the model again."
            )
        pickles = sorted(path.name for path in [*self.path.glob("*.bin"), *self.path.glob("*.pt*")])
        if pickles:
            raise BaseModelError(
                f"Base model {self.path} holds only pickle files ({', '.join(pickles)}), which can run code when "
                "loaded. Convert it to safetensors or take a checkpoint that has them."
            )
        raise MissingArtifactError(f"Base model {self.path} holds no *.safetensors. Fetch the model again.")

    def _indexed_files(self) -> list[Path]:
        weight_map = self._read_json(_INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise BaseModelError(f"{self.path / _INDEX} names no weight files. Fetch the model again.")
        names = sorted({str(name) for name in weight_map.values()})
        for name in names:
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise BaseModelError(
                    f"{self.path / _INDEX} names {name!r}; required is the name of a safetensors file beside it. "
                    "Fetch the model again from a source that you trust."
                )
        return [self.path / name for name in names]

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

        processor = AutoProcessor.from_pretrained(self.path, local_files_only=True, trust_remote_code=False)
        token = processor.image_token
        token_id = processor.tokenizer.convert_tokens_to_ids(token)
        if token_id != self.config.get("image_token_id"):
            raise BaseModelError(
                f"{self.path}: the tokenizer's image token {token!r} is id {token_id}, but config.json says "
                f"image_token_id {self.config.get('image_token_id')}. The files do not belong together."
            )
        return processor

    def load_model(
        self,
        dtype: str,
        device: torch.device | str,
        *,
        quantization: str | None = None,
        attention: str = "sdpa",
    ) -> PreTrainedModel:
        """The whole model in evaluation mode, on one device, nothing trainable.

        Args:
            dtype: `bfloat16`, `float16` or `float32`.
            device: where to put it.
            quantization: `nf4` or `int8` for the language model's frozen weights.
            attention: of the language model, by transformers' name; the tower's is SDPA, as in `load_vision_tower`.

        Raises:
            DeviceError: if what `quantization` or `attention` needs is not installed.
        """
        import torch
        from transformers import AutoModelForImageTextToText

        check_quantization(quantization)
        check_attention(attention)
        quantized: dict[str, Any] = {}
        if quantization is not None:  # such weights are made where they stay
            quantized = {"quantization_config": quantization_config(quantization, dtype), "device_map": {"": device}}
        model = AutoModelForImageTextToText.from_pretrained(
            self.path,
            dtype=getattr(torch, dtype),
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            attn_implementation=attention if attention == "sdpa" else {"": "sdpa", "text_config": attention},
            **quantized,
        )
        if quantization is not None:
            check_what_is_quantized(model)
        else:
            model = model.to(device)
        return model.eval().requires_grad_(False)

    def load_vision_tower(self, dtype: str, device: torch.device | str) -> PreTrainedModel:
        """The vision tower alone, so that encoding never holds the language model in memory."""
        import torch
        from safetensors import safe_open
        from transformers import AutoConfig, AutoModelForImageTextToText

        config = AutoConfig.from_pretrained(self.path, local_files_only=True, trust_remote_code=False)
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


def _entries(tree: Any) -> Iterator[tuple[str, Any]]:
    """Every key with its value, at any depth."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield key, value
            yield from _entries(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from _entries(value)


def digest(value: Any) -> str:
    """Hex sha256 of a JSON-able value, whatever the order of its keys."""
    import hashlib

    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
