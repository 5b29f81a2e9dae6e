"""The README of an adapter and of a merged model: use, metrics, data, settings, limits and licences."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen_vl_lora.model.adapter import RECORD_FILE
from qwen_vl_lora.model.base_model import BaseModel
from qwen_vl_lora.model.families import FAMILIES
from qwen_vl_lora.model.merging import MergeCheck
from qwen_vl_lora.model.shipped_base import note_on_base
from qwen_vl_lora.runs.storage import write_whole
from qwen_vl_lora.samples.conversations import Part, TextPart, ask_about
from qwen_vl_lora.samples.prompts import TrainedPrompt

CARD_FILE = "README.md"

_YOURS = "YOUR TEXT"

_MADE_BY = "- qwen-vl-lora, which made it:"

_METRICS_SECTION = re.compile(r"^## Metrics\n.*?(?=^## )", re.MULTILINE | re.DOTALL)

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)

_LIMITS = """- Other questions and picture sizes than those of its training were not measured.
- The held-out pictures come from the source of the training pictures; captions of other pictures may be worse.
- Captions may be wrong, and may repeat errors and prejudices of the base model and of the training captions."""

_README_HEAD = 1 << 16
"""Bytes of a README that are read: the hub's YAML head is at its beginning."""

_LICENCE = re.compile(r"""(["']?)([\w.+-]{1,64})\1""", re.ASCII)
"""A licence identifier of the hub, such as apache-2.0. Other values are not copied into the head of another file."""

_SIZES = ("resized_height", "resized_width", "min_pixels", "max_pixels")


def model_card(base_model: BaseModel, record: Mapping[str, Any], metrics: Mapping[str, Any], check: MergeCheck) -> str:
    """Markdown with the hub's YAML head.

    Args:
        record: of the adapter.
        metrics: `caption_metrics` of an evaluation of the same adapter.
    """
    sections = [
        _head(base_model),
        f"# {record['base_model']['name']}, fine-tuned on captions\n\n{_summary(record, metrics)}",
        f"## Use\n\n{_use(record, 'merged', thinks=bool(base_model.family.answer_start))}",
        f"## Metrics\n\n{_metrics(metrics)}",
        f"## Training data\n\n{_data(record)}",
        f"## Settings\n\n```json\n{_settings(record)}\n```",
        f"## Merging\n\n{_merging(check, record.get('quantization'))}",
        f"## Licences\n\n{_licences(stated_licence(base_model.path), _MERGED)}",
    ]
    return "\n\n".join(sections) + "\n"


def adapter_card(record: Mapping[str, Any], licence: str | None, *, thinks: bool = False) -> str:
    """Markdown with the hub's YAML head for an adapter that is not evaluated yet; see `note_metrics`.

    Args:
        record: of the adapter.
        licence: of the base, as its own README states it.
        thinks: whether the base's chat template has thinking, which the example switches off.
    """
    base, lora = record["base_model"], record["lora"]
    hub_id = base_hub_id(base)
    revision = f", revision `{base['revision']}`" if base["revision"] else ""
    head = [
        "---",
        *([f"base_model: {hub_id}", "base_model_relation: adapter"] if hub_id else []),
        "library_name: peft",
        "pipeline_tag: image-text-to-text",
        *([f"license: {licence}"] if licence else []),
        "tags: [lora, image-captioning]",
        "---",
    ]
    sections = [
        "\n".join(head),
        f"# LoRA adapter of {hub_id or base['name']} for captions\n\n"
        f"r {lora['r']}, lora_alpha {lora['lora_alpha']}, {record['training']['trainable_parameters']:,} trained "
        f"parameters, vision tower {record['vision']}.\n\n"
        f"- base model: `{base['name']}`{revision}{'' if hub_id else ', a folder of the machine that trained it'}\n"
        f"- base model fingerprint: `{base['fingerprint']}`\n"
        f"- run: `{record.get('run', {}).get('id', 'unknown')}`{_note(record)}",
        f"## Use\n\n{_use(record, 'adapter', thinks=thinks)}",
        "## Metrics\n\nNot evaluated: `kedro run --pipeline evaluation`.",
        f"## Training data\n\n{_data(record)}",
        f"## Settings\n\n```json\n{_settings(record)}\n```",
        f"## Limits\n\n{_LIMITS}",
        f"## Licences\n\n{_licences(licence, 'adapter is trained for it')}",
    ]
    return "\n\n".join(sections) + "\n"


def write_adapter_card(directory: Path, base_model: BaseModel | None = None) -> None:
    """Write the README of an adapter's directory from its record; without the base, what the present one says of it."""
    record = json.loads((directory / RECORD_FILE).read_text(encoding="utf-8"))
    card = directory / CARD_FILE
    if base_model is not None:
        licence, thinks = stated_licence(base_model.path), bool(base_model.family.answer_start)
    else:
        licence = stated_licence(directory)
        thinks = card.is_file() and _NO_THINKING in card.read_text(encoding="utf-8", errors="replace")
    write_whole(card, adapter_card(record, licence, thinks=thinks))


def note_metrics(directory: Path, metrics: Mapping[str, Any]) -> None:
    """Put the metrics of an evaluation into an adapter's README, and leave the rest of it as it is.

    A README that this project did not write is left alone.
    """
    file = directory / CARD_FILE
    if not file.is_file():
        return
    card = file.read_text(encoding="utf-8", errors="replace")
    if _MADE_BY in card and (section := _METRICS_SECTION.search(card)):
        told = f"## Metrics\n\n{_metrics(metrics)}\n\n"
        write_whole(file, card[: section.start()] + told + card[section.end() :])


def base_hub_id(base: Mapping[str, Any]) -> str | None:
    """The hub id of a recorded base: a base from a hub has a revision, a folder may be named after a published one."""
    if base["revision"] and _HUB_ID.fullmatch(hub_id := str(base["name"]).removeprefix("hf:")):
        return hub_id
    published = [hub_id for family in FAMILIES for hub_id in family.published]
    return next((hub_id for hub_id in published if hub_id.split("/")[1] == Path(base["name"]).name), None)


def _head(base_model: BaseModel) -> str:
    licence = stated_licence(base_model.path)
    hub_id = base_hub_id({"name": base_model.name, "revision": base_model.revision})  # Hugging Face refuses a path
    lines = [
        "---",
        *([f"base_model: {hub_id}"] if hub_id else []),
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
        f"{_note(record)}"
    )


def _note(record: Mapping[str, Any]) -> str:
    said = note_on_base(record)
    return "" if said is None else f"\n\n{said}"


_LOADS = {
    "merged": """from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("path/to/this/folder")
processor = AutoProcessor.from_pretrained("path/to/this/folder")""",
    "adapter": """from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor

base = {base!r}
model = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base), "path/to/this/folder")
processor = AutoProcessor.from_pretrained(base)""",
}

_NO_THINKING = ", enable_thinking=False"
"""Option of the chat templates that think. transformers refuses it for the others."""


def _use(record: Mapping[str, Any], kind: str, *, thinks: bool) -> str:
    thinking = _NO_THINKING if thinks else ""
    sizes = {name: record["image"][name] for name in _SIZES if record["image"][name]}
    trained = TrainedPrompt.of_record(record["prompt"])
    asked = trained.choose()
    if asked is None:
        which = f"{_trained_texts(trained)}\n\nPut the text that you want in place of `{_YOURS}`"
        user = None if trained.questions.is_one else _YOURS
        asked = trained.choose(user, None if trained.systems.is_one else _YOURS)
        assert asked is not None
    else:
        which = "Ask it as it was trained: this question"
    messages = [
        {"role": role, "content": [_content(part) for part in parts]} for role, parts in ask_about("x", asked).turns
    ]
    base = base_hub_id(record["base_model"]) or record["base_model"]["name"]
    greedily = "greedily (`generation_config.json`)" if kind == "merged" else "greedily"
    generated = "" if kind == "merged" else ", ".join(["", *_greedy(record)])
    return f"""{which}, pictures of this size, {greedily}.

```python
from qwen_vl_utils import fetch_image
{_LOADS[kind].format(base=base)}
messages = {messages!r}
text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True{thinking})
picture = fetch_image({{"image": "picture.jpg", **{sizes!r}}}, image_patch_size=processor.image_processor.patch_size)
inputs = processor(text=[text], images=[picture], do_resize=False, return_tensors="pt").to(model.device)
ids = model.generate(**inputs{generated})[:, inputs["input_ids"].shape[1] :]
print(processor.batch_decode(ids, skip_special_tokens=True)[0])
```"""


def _greedy(record: Mapping[str, Any]) -> list[str]:
    """Arguments of `generate` that give the captions of the evaluation: the base's own configuration may sample."""
    told = record["generation"]
    chosen = {"do_sample": False, **{name: told[name] for name in ("max_new_tokens", "repetition_penalty")}}
    return [f"{name}={value!r}" for name, value in chosen.items()]


def _content(part: Part) -> dict[str, str]:
    return {"type": "text", "text": part.text} if isinstance(part, TextPart) else {"type": "image"}


def _trained_texts(trained: TrainedPrompt) -> str:
    """Lists of the questions and of the system texts, if there are several."""
    lines = []
    for name, counted in (("questions", trained.questions), ("system texts", trained.systems)):
        if counted.is_one:
            continue
        lines.append(f"It was trained with {len(counted) or 'no'} {name}{':' if counted else ' about a picture.'}")
        for text, count in counted.texts:
            shown = json.dumps(text, ensure_ascii=False) if text is not None else "(the chat template's own)"
            lines.append(f"- {shown}: {count} samples")
        if counted.others:
            lines.append(f"- {counted.others} more")
    return "\n".join(lines)


def _metrics(metrics: Mapping[str, Any]) -> str:
    ranges = metrics.get("confidence")
    rows = [
        f"| {name} | {_value(metrics, 'base', name)} | {_value(metrics, 'tuned', name)} | "
        f"{_value(metrics, 'delta', name, '+')} |"
        for name in metrics["base"]
    ]
    if exact := metrics.get("exact_match"):
        rows.append(
            f"| exact match | {exact['base']:.0%} | {exact['tuned']:.0%} | "
            f"{100 * (exact['tuned'] - exact['base']):+.0f} percentage points |"
        )
    head = (
        f"{metrics['num_images']} held-out pictures, tokenizer {metrics['tokenizer']}; CIDEr on its scale of 0 to 10"
        f"{'; in brackets 95 % intervals over pictures' if ranges else ''}."
    )
    return "\n".join([head, "", "| metric | base | tuned | change |", "|---|---|---|---|", *rows])


def _value(metrics: Mapping[str, Any], side: str, name: str, sign: str = "") -> str:
    low, high = metrics["confidence"][side][name] if "confidence" in metrics else (None, None)
    interval = "" if low is None else f" ({low:{sign}.3f} to {high:{sign}.3f})"
    return f"{metrics[side][name]:{sign}.3f}{interval}"


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


_MERGED = "merged weights are a derivative of it and stay under its licence"


def _licences(stated: str | None, what: str) -> str:
    base = f"`{stated}`" if stated else "not stated in its folder; see the page that it came from"
    return (
        f"- base model: {base}. The {what}.\n"
        "- training pictures and captions: each keeps its own licence. Name it here before you publish this model.\n"
        f"{_MADE_BY} Apache-2.0."
    )


def stated_licence(folder: Path) -> str | None:
    """The `license:` line in the head of a folder's README, for any encoding and length of the README."""
    readme = folder / CARD_FILE
    if not readme.is_file():
        return None
    with readme.open("rb") as file:
        head, _, rest = file.read(_README_HEAD).decode("utf-8-sig", errors="replace").partition("\n")
    if head.strip() != "---":
        return None
    for line in rest.splitlines():
        if line.strip() == "---":
            break
        name, _, value = line.partition(":")
        if name.strip() == "license" and (stated := _LICENCE.fullmatch(value.strip())):
            return stated[2]
    return None
