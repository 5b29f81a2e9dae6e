"""The README of a merged model: what a stranger needs to use it, and to judge it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from qwen_vl_lora.modeling.base_model import BaseModel
from qwen_vl_lora.modeling.merging import MergeCheck

_SIZES = ("resized_height", "resized_width", "min_pixels", "max_pixels")


def model_card(base_model: BaseModel, record: Mapping[str, Any], metrics: Mapping[str, Any], check: MergeCheck) -> str:
    """Markdown with the hub's YAML head.

    Args:
        record: the adapter's.
        metrics: `caption_metrics` of an evaluation of the same adapter.
    """
    sections = [
        _head(base_model),
        f"# {record['base_model']['name']}, fine-tuned on captions\n\n{_summary(record, metrics)}",
        f"## Use\n\n{_use(record)}",
        f"## Metrics\n\n{_metrics(metrics)}",
        f"## Training data\n\n{_data(record)}",
        f"## Settings\n\n```json\n{_settings(record)}\n```",
        f"## Merging\n\n{_merging(check, record.get('quantization'))}",
        f"## Licences\n\n{_licences(base_model)}",
    ]
    return "\n\n".join(sections) + "\n"


def _head(base_model: BaseModel) -> str:
    licence = _stated_licence(base_model)
    lines = [
        "---",
        f"base_model: {json.dumps(base_model.name, ensure_ascii=False)}",
        "library_name: transformers",
        "pipeline_tag: image-text-to-text",
        *([f"license: {licence}"] if licence else []),
        "tags: [lora, merged, image-captioning]",
        "---",
    ]
    return "\n".join(lines)


def _summary(record: Mapping[str, Any], metrics: Mapping[str, Any]) -> str:
    base, lora = record["base_model"], record["lora"]
    revision = f", revision `{base['revision']}`" if base["revision"] else ""
    return (
        f"`{base['name']}`{revision}, with a LoRA adapter (r {lora['r']}, lora_alpha {lora['lora_alpha']}) merged into "
        f"its weights. CIDEr on {metrics['num_images']} held-out pictures: {metrics['base']['CIDEr']:.3f} before, "
        f"{metrics['tuned']['CIDEr']:.3f} after.\n\n"
        f"- run: `{record.get('run', {}).get('id', 'unknown')}`\n"
        f"- base model fingerprint: `{base['fingerprint']}`"
    )


def _use(record: Mapping[str, Any]) -> str:
    sizes = {name: record["image"][name] for name in _SIZES if record["image"][name]}
    asked = record["prompt"]
    messages: list[dict[str, Any]] = []
    if asked["system"] is not None:
        messages.append({"role": "system", "content": [{"type": "text", "text": asked["system"]}]})
    content = [{"type": "image"}, {"type": "text", "text": asked["user"]}]
    messages.append({"role": "user", "content": content})
    return f"""Ask it as it was trained: this question, pictures of this size, greedily (`generation_config.json`).

```python
from qwen_vl_utils import fetch_image
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("path/to/this/folder")
processor = AutoProcessor.from_pretrained("path/to/this/folder")
messages = {messages!r}
text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
picture = fetch_image({{"image": "picture.jpg", **{sizes!r}}}, image_patch_size=processor.image_processor.patch_size)
inputs = processor(text=[text], images=[picture], do_resize=False, return_tensors="pt").to(model.device)
ids = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
print(processor.batch_decode(ids, skip_special_tokens=True)[0])
```"""


def _metrics(metrics: Mapping[str, Any]) -> str:
    rows = [
        f"| {name} | {metrics['base'][name]:.3f} | {metrics['tuned'][name]:.3f} | {metrics['delta'][name]:+.3f} |"
        for name in metrics["base"]
    ]
    head = (
        f"{metrics['num_images']} held-out pictures, tokenizer {metrics['tokenizer']}; CIDEr on its scale of 0 to 10."
    )
    return "\n".join([head, "", "| metric | base | tuned | change |", "|---|---|---|---|", *rows])


def _data(record: Mapping[str, Any]) -> str:
    data = record["data"]
    lines = [f"- {data[name]['samples']} samples in `{name}`, sha256 `{data[name]['sha256']}`" for name in sorted(data)]
    read = record.get("run", {}).get("read", {})
    lines += [f"- `{name}` version `{read[name]['version']}`" for name in sorted(read) if read[name].get("version")]
    return "\n".join(lines)


def _settings(record: Mapping[str, Any]) -> str:
    names = ("prompt", "image", "generation", "max_length", "vision", "rows", "lora", "training_args")
    return json.dumps({name: record[name] for name in names}, indent=2, ensure_ascii=False)


def _merging(check: MergeCheck, quantization: str | None) -> str:
    trained = (
        f"The adapter was trained on {quantization} weights and merged into the full ones. " if quantization else ""
    )
    return (
        f"{trained}"
        f"Stored as {check.dtype}. On held-out conversations its logits differ from those of base + adapter by "
        f"{check.error:.2e} (root mean square, relative; at most {check.tolerance:.0e} is accepted), and from those "
        f"of the base by {check.effect:.2e}."
    )


def _licences(base_model: BaseModel) -> str:
    stated = _stated_licence(base_model)
    base = f"`{stated}`" if stated else "not stated in its folder; see the page that it came from"
    return (
        f"- base model: {base}. The merged weights are a derivative of it and stay under its licence.\n"
        "- training pictures and captions: each keeps its own licence. Name it here before you publish this model.\n"
        "- qwen-vl-lora, which made it: Apache-2.0."
    )


def _stated_licence(base_model: BaseModel) -> str | None:
    """The `license:` line in the head of the base's own README."""
    readme = base_model.path / "README.md"
    if not readme.is_file():
        return None
    parts = readme.read_text(encoding="utf-8").split("---")
    if len(parts) < 3 or parts[0].strip():
        return None
    for line in parts[1].splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "license":
            return value.strip() or None
    return None
