"""An adapter merged into its base model: a directory that plain transformers loads.

The other files of the base are copied unchanged, so a tool that reads the base also reads the merged
model. Before publication its logits are compared with those of base + adapter.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_vl_lora.exceptions import AdapterError
from qwen_vl_lora.model.adapter import Adapter
from qwen_vl_lora.model.base_model import BaseModel
from qwen_vl_lora.parameters import ExportParameters

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

logger = logging.getLogger(__name__)

Probe = Callable[[Any], "torch.Tensor"]
"""Logits of a model on fixed inputs, as a float32 tensor on the CPU."""

TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
"""Largest accepted `distance` of the merged model from base + adapter, caused by rounding to the type."""

LEAST_EFFECT = 4
"""The adapter must change the logits by at least this many times the merge's error."""

_TAKEN_OVER = (".json", ".txt", ".jinja", ".md", "")
"""Suffixes of files that are copied, licences included. The README is replaced, weights are not copied."""


@dataclass(frozen=True)
class MergeCheck:
    """Measurements before publication: distances of logits, relative to those of base + adapter.

    Attributes:
        dtype: precision of the merged weights.
        error: of the merged model as loaded from disk, to base + adapter.
        effect: of base + adapter to the base alone.
        tolerance: largest `error` that is accepted.
    """

    dtype: str
    error: float
    effect: float
    tolerance: float


def merge_adapter(
    base_model: BaseModel,
    adapter: Adapter,
    directory: Path,
    export: ExportParameters,
    device: torch.device,
    probe: Probe,
) -> MergeCheck:
    """Write base + adapter as one model into `directory`, which is replaced, and check it.

    One model is in memory at a time.

    Raises:
        AdapterError: if the merged model's logits differ from those of base + adapter, or the adapter changes nothing.
    """
    dtype = stored_dtype(base_model) if export.dtype == "base" else export.dtype
    plain = base_model.load_model(dtype, device)
    base = probe(plain)
    model = adapter.attach(plain)
    tuned = probe(model)
    shutil.rmtree(directory, ignore_errors=True)
    merged, untied = _merge(model)
    merged.save_pretrained(directory, max_shard_size=export.max_shard_size)
    del plain, model, merged
    _take_over_files(base_model, directory, dtype, untied=untied)
    _write_generation_config(base_model, adapter, directory)

    written = probe(BaseModel(name="merged", path=directory).load_model(dtype, device))
    check = MergeCheck(dtype, distance(written, tuned), distance(base, tuned), TOLERANCE[dtype])
    _require_good(check, adapter)
    logger.info(
        "The merged model's logits differ from base + adapter by %.1e; %.0e is allowed.", check.error, check.tolerance
    )
    return check


def merged_if_exact(model: PeftModel) -> Any:
    """Base + adapter as one model without the adapter's own products, if its weights are float32; else as it is.

    Coarser weights would round the adapter away. The base's weights are changed in place.
    """
    import torch

    if any(parameter.dtype != torch.float32 for parameter in model.parameters()):
        return model
    return _merge(model)[0]


def _merge(model: Any) -> tuple[Any, bool]:
    """The merged model, and whether its embedding and output layer are no longer tied."""
    untied = _untie_adapted_embeddings(model)
    return model.merge_and_unload(safe_merge=True), untied


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Root mean square of the difference, as a share of the root mean square of `other`."""
    return float((one - other).pow(2).mean().sqrt() / other.pow(2).mean().sqrt())


def stored_dtype(base_model: BaseModel) -> str:
    """Precision of the base's weights, from its config.json; float32 if not stated."""
    config = base_model.config
    dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
    return str(dtype).removeprefix("torch.")


def _require_good(check: MergeCheck, adapter: Adapter) -> None:
    where = f"Adapter {adapter.path} merged in {check.dtype}"
    if check.effect == 0:
        raise AdapterError(f"{where}: it changes no logit of its base. Export an adapter that was trained.")
    if check.error <= check.tolerance and check.error * LEAST_EFFECT <= check.effect:
        return
    raise AdapterError(
        f"{where}: the merged model's logits differ from those of base + adapter by {check.error:.2%}. "
        f"Expected at most {check.tolerance:.2%}, and at most 1/{LEAST_EFFECT} of the adapter's own change, which is "
        f"{check.effect:.2%}. Nothing was published. Set export.dtype: float32, which keeps more digits."
    )


def _untie_adapted_embeddings(model: Any) -> bool:
    """Untie embedding and output layer if the adapter changes one of them, else the merge would change both.

    An output layer in `modules_to_save` has its own weights already.
    """
    from peft.tuners.lora import LoraLayer
    from peft.utils.other import ModulesToSaveWrapper

    inner = model.get_base_model()
    if not inner.config.tie_word_embeddings:
        return False
    ends = (inner.get_input_embeddings(), inner.get_output_embeddings())
    if not any(isinstance(end, LoraLayer | ModulesToSaveWrapper) for end in ends):
        return False
    import torch

    if not isinstance(ends[1], ModulesToSaveWrapper):
        head = ends[1].get_base_layer() if isinstance(ends[1], LoraLayer) else ends[1]
        head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    for config in (inner.config, inner.config.get_text_config()):
        config.tie_word_embeddings = False
    return True


def _take_over_files(base_model: BaseModel, directory: Path, dtype: str, *, untied: bool) -> None:
    """Copy the base's config, tokenizer, preprocessor and licence, which newer libraries would write in other forms."""
    for path in base_model.path.iterdir():
        described = path.suffix in _TAKEN_OVER and not path.name.startswith(".") and path.is_file()
        if described and path.name not in ("README.md", "model.safetensors.index.json"):
            shutil.copyfile(path, directory / path.name)
    config = _with_dtype(base_model.config, dtype)
    if untied:
        config["tie_word_embeddings"] = False
        if "text_config" in config:
            config["text_config"]["tie_word_embeddings"] = False
    (directory / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    return {
        key: dtype
        if key in ("dtype", "torch_dtype")
        else _with_dtype(value, dtype)
        if isinstance(value, dict)
        else value
        for key, value in config.items()
    }


def _write_generation_config(base_model: BaseModel, adapter: Adapter, directory: Path) -> None:
    """Write a greedy config, so that a plain `generate` gives the captions of the report; the base's own samples."""
    from transformers import GenerationConfig

    base = GenerationConfig.from_pretrained(base_model.path, local_files_only=True)
    asked = adapter.record["generation"]
    GenerationConfig(
        bos_token_id=base.bos_token_id,
        eos_token_id=base.eos_token_id,
        pad_token_id=base.pad_token_id,
        do_sample=False,
        repetition_penalty=asked["repetition_penalty"],
        max_new_tokens=asked["max_new_tokens"],
    ).save_pretrained(directory)
