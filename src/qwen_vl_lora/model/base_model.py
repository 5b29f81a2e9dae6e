"""The base model on disk: identity, checks and loading.

Imports torch and transformers only when weights or the processor are loaded.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_vl_lora.exceptions import BaseModelError, DeviceError, MissingArtifactError
from qwen_vl_lora.faults import library_faults
from qwen_vl_lora.model.base_files import check_contents, check_tensors, read_settings, side_files, weight_files
from qwen_vl_lora.model.devices import check_attention, usable_dtype
from qwen_vl_lora.model.families import Family, family_of
from qwen_vl_lora.model.fingerprints import stored_tensors, vision_sha256, weights_sha256
from qwen_vl_lora.model.flex_attention import FLEX, register_flex_attention
from qwen_vl_lora.model.geometry import Geometry
from qwen_vl_lora.model.tower_outputs import accept_tower_outputs
from qwen_vl_lora.parameters import Parameters
from qwen_vl_lora.runs.artifacts import digest
from qwen_vl_lora.runs.storage import file_sha256

if TYPE_CHECKING:
    import torch
    from transformers import BitsAndBytesConfig, PreTrainedModel, ProcessorMixin


@dataclass(frozen=True)
class BaseModel:
    """A read-only handle on a base model's directory. Weights load on demand.

    Attributes:
        name: as configured, a path or a hub id.
        path: directory with config, processor files and safetensors.
        revision: hub revision, or None for a plain directory.
    """

    name: str
    path: Path
    revision: str | None = None

    def check(self) -> None:
        """Check that the directory is usable. Reads texts and the weights' headers, but no weights.

        Raises:
            MissingArtifactError: if the directory or a file in it is not found.
            BaseModelError: if a file is damaged, asks for remote code, brings other weights or is of another family.
        """
        if not self.path.is_dir():
            raise MissingArtifactError(
                f"Base model {self.path} not found. Give a directory with config.json and *.safetensors "
                '(--params "base_model=…"), or build the tiny one: kedro run --pipeline base_model.'
            )
        with self._faults_in_words("read"):
            check_contents(self.path)
            check_tensors(self.path, self.weight_files, self.family)

    def check_loads(self) -> None:
        """Check that the processor loads, the weights are exactly those of the architecture, and its layers compute.

        Takes seconds and no memory for weights: names, shapes and layers are tried without values.

        Raises:
            BaseModelError: naming what is missing, surplus, of another shape or impossible.
        """
        import torch

        self.load_processor()
        model: Any = self.load_structure()
        with self._faults_in_words("compute with"), torch.device("meta"):
            width = model.config.get_text_config().hidden_size
            places = torch.zeros(3, 1, 2, dtype=torch.long)
            self.family.language_model_of(model)(
                inputs_embeds=torch.zeros(1, 2, width),
                position_ids=places,
                attention_mask=torch.ones(1, 1, 2, 2, dtype=torch.bool),
                use_cache=False,
            )

    def load_structure(self) -> PreTrainedModel:
        """The whole model without memory for its weights (on torch's `meta`), names and shapes compared.

        Raises:
            BaseModelError: as `load_model`, for everything but the values of weights.
        """
        model: PreTrainedModel = self._load("float32", device_map="meta")
        return model

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """The content of config.json."""
        try:
            return read_settings(self.path / "config.json")
        except FileNotFoundError as error:
            raise MissingArtifactError(f"Base model {self.path} has no config.json. Give a model directory.") from error

    @property
    def family(self) -> Family:
        """Raises: BaseModelError naming a family that is not supported."""
        return family_of(self.config, f"Base model {self.path}")

    @property
    def geometry(self) -> Geometry:
        """Its sizes from config.json. Raises: BaseModelError naming a missing key."""
        return self.family.geometry(self.config)

    @functools.cached_property
    def weight_files(self) -> list[Path]:
        """The safetensors files that are loaded. Raises as `base_files.weight_files`."""
        return weight_files(self.path)

    @functools.cached_property
    def files(self) -> dict[str, str]:
        """File name → sha256 of every file that a prediction depends on.

        Raises:
            BaseModelError: if a weight is not a finite floating-point number.
        """
        self.check()
        texts = {path.relative_to(self.path).as_posix(): file_sha256(path) for path in side_files(self.path)}
        with ThreadPoolExecutor() as pool:
            weights = dict(zip(self.weight_files, pool.map(weights_sha256, self.weight_files), strict=True))
        return texts | {path.name: sha256 for path, sha256 in weights.items()}

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hex sha256 over `files`."""
        return digest(self.files)

    @functools.cached_property
    def vision_fingerprint(self) -> str:
        """Hex sha256 of all that computes a picture's features: vision weights, their config, the preprocessor."""
        preprocessor = {name: value for name, value in self.files.items() if name.endswith("processor_config.json")}
        return digest([vision_sha256(self.weight_files, self.family), self.config["vision_config"], preprocessor])

    def load_processor(self) -> ProcessorMixin:
        """Tokenizer, image processor and chat template.

        Raises:
            BaseModelError: if one of them is missing or damaged, or if tokenizer and model disagree on the image
                token or the vocabulary: such a pair would train without pictures.
        """
        from transformers import AutoProcessor

        with self._faults_in_words("load the processor of"):
            processor = AutoProcessor.from_pretrained(self.path, local_files_only=True, trust_remote_code=False)
            self._check_processor(processor)
        return processor

    def _check_processor(self, processor: Any) -> None:
        """Check that it is complete and its parts belong to the model."""
        lacking = [part for part in ("tokenizer", "image_processor", "image_token") if not hasattr(processor, part)]
        if lacking:
            raise BaseModelError(
                f"{self.path} has no processor: {', '.join(lacking)} not found in what its files describe "
                f"({type(processor).__name__}). Expected preprocessor_config.json or processor_config.json with "
                "image_processor, and tokenizer.json. Fetch the model again."
            )
        token = processor.image_token
        token_id = processor.tokenizer.convert_tokens_to_ids(token)
        if token_id != self.config.get("image_token_id"):
            raise BaseModelError(
                f"{self.path}: the tokenizer's image token {token!r} is id {token_id}, but config.json says "
                f"image_token_id {self.config.get('image_token_id')}. The files do not belong together."
            )
        vocabulary = self.config.get("text_config", self.config)["vocab_size"]
        if len(processor.tokenizer) > vocabulary:
            raise BaseModelError(
                f"{self.path}: the tokenizer has {len(processor.tokenizer)} tokens, but config.json says vocab_size "
                f"{vocabulary}. The files do not belong together."
            )
        self._check_trial(processor)

    def _check_trial(self, processor: Any) -> None:
        """Check the encoding of a trial picture, question and answer."""
        import numpy as np
        import torch

        from qwen_vl_lora.model.chat import render

        question, answer = "Describe this picture.", "A dog."
        messages = [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ]
        with self._faults_in_words("use the chat template of"):
            asked = render(processor, messages[:1], add_generation_prompt=True)
            whole = render(processor, messages, add_generation_prompt=False)
        end = processor.tokenizer.eos_token
        if asked.count(processor.image_token) != 1 or question not in asked or not whole.startswith(asked):
            raise BaseModelError(
                f"{self.path}: the chat template does not show the model a picture and a question: for one "
                f"picture and one text it renders {asked[:200]!r}. Take the template of the published checkpoint."
            )
        if not end or f"{answer}{end}" not in whole:
            raise BaseModelError(
                f"{self.path}: the chat template does not end an answer with the tokenizer's eos_token {end!r}, so "
                f"the end of captions cannot be learned: it renders {whole[-100:]!r}. The files do not belong together."
            )
        if not whole.startswith(f"{asked}{answer}"):
            raise BaseModelError(
                f"{self.path}: the chat template puts {whole[len(asked) :].partition(answer)[0]!r} between prompt and "
                "answer, which every caption would repeat. A base that always thinks cannot be trained; take the "
                "Instruct checkpoint."
            )
        vision = self.config["vision_config"]
        patch = vision.get("patch_size", self.family.patch_size)
        merge = vision.get("spatial_merge_size", self.family.merge_size)
        side = 2 * patch * merge
        picture = np.zeros((side, side, 3), dtype=np.uint8)
        inputs = processor(text=[asked], images=[picture], do_resize=False, return_tensors="pt")
        grid, tokens = inputs["image_grid_thw"].tolist(), (inputs["input_ids"] == self.config["image_token_id"]).sum()
        if grid != [[1, 2 * merge, 2 * merge]] or tokens != 4 or not torch.isfinite(inputs["pixel_values"]).all():
            raise BaseModelError(
                f"{self.path}: the image processor makes grid {grid} and {int(tokens)} image tokens of a picture of "
                f"{side} x {side} px; expected [[1, {2 * merge}, {2 * merge}]] and 4 by config.json's patch_size "
                f"{patch} and spatial_merge_size {merge}, and finite values. The files do not belong together."
            )

    def load_configured(
        self, settings: Parameters, device: torch.device, *, attention: str = "sdpa"
    ) -> PreTrainedModel:
        """`load_model` in the precision and quantization of the settings; float16 on a GPU without bfloat16."""
        dtype = usable_dtype(settings.training_args.dtype, device)
        return self.load_model(dtype, device, quantization=settings.quantization, attention=attention)

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
            attention: of the language model; the tower uses SDPA, as in `load_vision_tower`.

        Raises:
            BaseModelError: if the files have other tensors than the architecture, or weights that are not finite.
            DeviceError: if a package for `quantization` or `attention` is not installed.
        """
        check_quantization(quantization)
        check_attention(attention)
        _ = self.files  # checks every weight, once
        if attention == FLEX:
            attention = register_flex_attention()
        quantized: dict[str, Any] = {}
        if quantization is not None:  # quantized weights are created on their final device
            quantized = {
                "quantization_config": quantization_config(quantization, dtype, self.family),
                "device_map": {"": device},
            }
        model = self._load(
            dtype,
            attn_implementation=attention if attention == "sdpa" else {"": "sdpa", "text_config": attention},
            **quantized,
        )
        if quantization is not None:
            check_what_is_quantized(model, self.family)
            keep_exact_on_cpu(model)
        else:
            self._check_tied(model)
            model = model.to(device)
        accept_tower_outputs(self.family.above_tower_of(model))
        return model.eval().requires_grad_(False)

    def _check_tied(self, model: Any) -> None:
        """Check that tied weights are tied: transformers silently unties two that differ."""
        ends = (model.get_input_embeddings().weight, model.get_output_embeddings().weight)
        if model.config.tie_word_embeddings and ends[0] is not ends[1]:
            raise BaseModelError(
                f"Base model {self.path} stores lm_head.weight and embed_tokens.weight with different values, but "
                "config.json says tie_word_embeddings: true. Set it to false if the weights are right, or fetch the "
                "model again."
            )

    def _load(self, dtype: str, **options: Any) -> Any:
        """The model loaded by transformers, whose loading report must be empty."""
        import torch
        from transformers import AutoModelForImageTextToText
        from transformers.utils import logging as transformers_logging

        shows_progress = transformers_logging.is_progress_bar_enabled()
        transformers_logging.disable_progress_bar()  # the run has its own, of what takes longer
        reporter = logging.getLogger("transformers.modeling_utils")
        reporter.addFilter(_is_no_report)  # the error message has the report's content
        try:
            with self._faults_in_words("load"):
                model, report = AutoModelForImageTextToText.from_pretrained(
                    self.path,
                    dtype=getattr(torch, dtype),
                    local_files_only=True,
                    trust_remote_code=False,
                    use_safetensors=True,
                    output_loading_info=True,
                    **options,
                )
        finally:
            reporter.removeFilter(_is_no_report)
            if shows_progress:
                transformers_logging.enable_progress_bar()
        faults = {
            "lacks": report["missing_keys"],
            "has no place for": report["unexpected_keys"],
            "has in another shape": {str(key) for key in report["mismatched_keys"]},
            "could not load": report["error_msgs"],
        }
        self._require_none(faults)
        return model

    def _require_none(self, faults: dict[str, Any]) -> None:
        """Raises: BaseModelError if any of the faults has a name."""
        said = [
            f"it {fault} {', '.join(sorted(names)[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
            for fault, names in faults.items()
            if names
        ]
        if said:
            raise BaseModelError(
                f"Base model {self.path} does not hold the weights of its architecture: {'; '.join(said)}. Missing "
                "weights would be random numbers, and surplus ones would be ignored. Fetch the model again."
            )

    def load_vision_tower(self, dtype: str, device: torch.device | str) -> PreTrainedModel:
        """The vision tower alone, so that encoding does not need memory for the language model.

        Raises:
            BaseModelError: as `load_model`, for the tower's tensors.
        """
        import torch
        from safetensors import safe_open
        from transformers import AutoConfig, AutoModelForImageTextToText

        _ = self.files  # checks every weight, once
        with self._faults_in_words("load the vision tower of"):
            config = AutoConfig.from_pretrained(self.path, local_files_only=True, trust_remote_code=False)
            with torch.device("meta"):
                tower_class = type(self.family.tower_of(AutoModelForImageTextToText.from_config(config)))
            tower = tower_class._from_config(
                config.vision_config, attn_implementation="sdpa", dtype=getattr(torch, dtype)
            )
            weights = {}
            for path in self.weight_files:
                with safe_open(path, framework="pt") as file:
                    for tensor in stored_tensors(path):
                        name = self.family.name_in_tower(tensor.name)
                        if name is not None:
                            weights[name] = file.get_tensor(tensor.name)
            tower.load_state_dict(weights, strict=True)
        return tower.to(device).eval().requires_grad_(False)

    @contextmanager
    def _faults_in_words(self, doing: str) -> Iterator[None]:
        """Convert errors of safetensors, tokenizers, jinja, transformers and torch on damaged files."""

        def in_words(said: str) -> BaseModelError:
            return BaseModelError(
                f"Cannot {doing} base model {self.path}: {said[:500]}. Its files are damaged, or were "
                "not made for the installed transformers. Fetch the model again."
            )

        with library_faults(in_words):
            yield


def _is_no_report(record: logging.LogRecord) -> bool:
    return "LOAD REPORT" not in record.getMessage()


def check_packages(settings: Parameters) -> None:
    """Check that the packages for `attention` and `quantization` are installed. Imports nothing.

    Raises:
        DeviceError: naming the one that is not.
    """
    check_attention(settings.attention)
    check_quantization(settings.quantization)


def check_quantization(quantization: str | None) -> None:
    """Check that bitsandbytes is installed if it is needed. Imports nothing.

    Raises:
        DeviceError: if it is not.
    """
    if quantization is not None and importlib.util.find_spec("bitsandbytes") is None:
        raise DeviceError(
            f"quantization: {quantization} needs bitsandbytes, which is not installed. "
            'Install it (pip install "qwen-vl-lora[qlora]", or pip install bitsandbytes), or set quantization: null.'
        )


def quantization_config(quantization: str, dtype: str, family: Family) -> BitsAndBytesConfig:
    """bitsandbytes' configuration for `nf4` (with double quantization, as in QLoRA) or `int8`.

    Tower and output layer keep their precision, so stored features and their key are those of the unquantized model.

    Args:
        dtype: precision in which quantized layers compute.
    """
    import torch
    from transformers import BitsAndBytesConfig

    kept = [family.tower, "lm_head", *family.unquantized]  # transformers matches beginnings and ends of names
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
        llm_int8_skip_modules=kept,
    )


def check_what_is_quantized(model: Any, family: Family) -> None:
    """Check which layers are quantized: transformers' versions match names differently, silently even if none matches.

    Raises:
        BaseModelError: if a layer of the tower was quantized, or none of the language model.
    """
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    names = [name for name, module in model.named_modules() if isinstance(module, (Linear4bit, Linear8bitLt))]
    in_tower = sum(map(family.is_in_tower, names))
    if not names or in_tower:
        raise BaseModelError(
            f"Quantization reached {len(names)} layers, {in_tower} of them in the "
            "vision tower; expected those of the language model only. This version of transformers is not "
            "usable with quantization."
        )


def keep_exact_on_cpu(model: Any) -> None:
    """Keep bitsandbytes from packing nf4 weights anew for generation on CPUs with AVX512-BF16.

    It then rounds their scales to bfloat16, so that a caption would come from other weights than were trained, and it
    fails on layers whose width is no multiple of 64.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def difference_of(path: Path, files: Mapping[str, Any]) -> str:
    """What a machine lacks that should have a base model with these files and hashes at `path`; empty if nothing."""
    if not path.is_dir():
        return f"has no base model {path}. Put it below the project folder, or at the same path"
    if BaseModel("base", path).files != files:
        return f"has other files of the base model {path} than this one. Copy it again"
    return ""
