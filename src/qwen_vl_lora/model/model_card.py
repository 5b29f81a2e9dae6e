"""The README of an adapter and of a merged model: use, metrics, data, settings, limits and licences."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qwen_vl_lora.model.adapter import RECORD_FILE
from qwen_vl_lora.model.base_model import BaseModel
from qwen_vl_lora.model.families import FAMILIES
from qwen_vl_lora.model.merging import MergeCheck
from qwen_vl_lora.model.shipped_base import note_on_base
from qwen_vl_lora.pages.language import CHINESE, ENGLISH, Language
from qwen_vl_lora.runs.storage import write_whole
from qwen_vl_lora.samples.conversations import Part, TextPart, ask_about
from qwen_vl_lora.samples.prompts import TrainedPrompt
from qwen_vl_lora.samples.records import IMAGE_SLOT

CARD_FILE = "README.md"

_YOURS = "YOUR TEXT"

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)

_README_HEAD = 1 << 16
"""Bytes of a README that are read: the hub's YAML head is at its beginning."""

_LICENCE = re.compile(r"""(["']?)([\w.+-]{1,64})\1""", re.ASCII)
"""A licence identifier of the hub, such as apache-2.0. Other values are not copied into the head of another file."""

_SIZES = ("resized_height", "resized_width", "min_pixels", "max_pixels")


def model_card(
    base_model: BaseModel,
    record: Mapping[str, Any],
    metrics: Mapping[str, Any],
    check: MergeCheck,
    language: Language = ENGLISH,
) -> str:
    """Markdown with the hub's YAML head.

    Args:
        record: of the adapter.
        metrics: `caption_metrics` of an evaluation of the same adapter.
    """
    title = language("card_merged_title", base=record["base_model"]["name"])
    sections = [
        _head(base_model),
        f"# {title}\n\n{_summary(record, metrics, language)}",
        _section("use", _use(record, "merged", language, thinks=bool(base_model.family.answer_start)), language),
        _section("metrics", _metrics(metrics, language), language),
        _section("data", _data(record, language), language),
        _section("settings", _settings(record), language),
        _section("merging", _merging(check, record.get("quantization"), language), language),
        _section("licences", _licences(stated_licence(base_model.path), "merged", language), language),
    ]
    return "\n\n".join(sections) + "\n"


def adapter_card(
    record: Mapping[str, Any], licence: str | None, language: Language = ENGLISH, *, thinks: bool = False
) -> str:
    """Markdown with the hub's YAML head for an adapter that is not evaluated yet; see `note_metrics`.

    Args:
        record: of the adapter.
        licence: of the base, as its own README states it.
        thinks: whether the base's chat template has thinking, which the example switches off.
    """
    hub_id = base_hub_id(record["base_model"])
    head = [
        "---",
        *([f"base_model: {hub_id}", "base_model_relation: adapter"] if hub_id else []),
        "library_name: peft",
        "pipeline_tag: image-text-to-text",
        *([f"license: {licence}"] if licence else []),
        "tags: [lora, image-captioning]",
        "---",
    ]
    limits = "\n".join(f"- {language(f'card_limit_{name}')}" for name in ("sizes", "source", "errors"))
    title = language("card_adapter_title", base=hub_id or record["base_model"]["name"])
    sections = [
        "\n".join(head),
        f"# {title}\n\n{_origin(record, language, is_local=hub_id is None)}",
        _section("use", _use(record, "adapter", language, thinks=thinks), language),
        _section("metrics", language("card_not_evaluated"), language),
        _section("data", _data(record, language), language),
        _section("settings", _settings(record), language),
        _section("limits", limits, language),
        _section("licences", _licences(licence, "adapter", language), language),
    ]
    return "\n\n".join(sections) + "\n"


def language_of_card(card: str) -> Language | None:
    """The language of a README that this project wrote; None for another one."""
    return next((one for one in (ENGLISH, CHINESE) if f"- {one('card_made_by')}" in card), None)


def _section(name: str, content: str, language: Language) -> str:
    return f"## {language(f'card_{name}')}\n\n{content}"


def _origin(record: Mapping[str, Any], language: Language, *, is_local: bool) -> str:
    """What the adapter is, its base and its run."""
    base, lora = record["base_model"], record["lora"]
    vision, parameters = language(f"tower_{record['vision']}"), f"{record['training']['trainable_parameters']:,}"
    return (
        language("card_adapter_lora", r=lora["r"], alpha=lora["lora_alpha"], parameters=parameters, vision=vision)
        + f"\n\n- {language('card_base', name=base['name'])}{_revision(base, language)}"
        + (language("card_local_base") if is_local else "")
        + f"\n- {language('card_fingerprint', fingerprint=base['fingerprint'])}"
        + f"\n- {_run(record, language)}{_note(record, language)}"
    )


def _revision(base: Mapping[str, Any], language: Language) -> str:
    return language("card_revision", revision=base["revision"]) if base["revision"] else ""


def _run(record: Mapping[str, Any], language: Language) -> str:
    return language("card_run", run=record.get("run", {}).get("id", language("unknown")))


def write_adapter_card(directory: Path, base_model: BaseModel | None = None, language: Language | None = None) -> None:
    """Write the README of an adapter's directory from its record.

    Args:
        base_model: without it, what the present README says of the base.
        language: without it, that of the present README.
    """
    record = json.loads((directory / RECORD_FILE).read_text(encoding="utf-8"))
    file = directory / CARD_FILE
    present = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    if base_model is not None:
        licence, thinks = stated_licence(base_model.path), bool(base_model.family.answer_start)
    else:
        licence, thinks = stated_licence(directory), _NO_THINKING in present
    language = language or language_of_card(present) or ENGLISH
    write_whole(file, adapter_card(record, licence, language, thinks=thinks))


def note_metrics(directory: Path, metrics: Mapping[str, Any]) -> None:
    """Put the metrics of an evaluation into an adapter's README, in its language, and leave the rest of it as it is.

    A README that this project did not write is left alone.
    """
    file = directory / CARD_FILE
    if not file.is_file():
        return
    card = file.read_text(encoding="utf-8", errors="replace")
    if (language := language_of_card(card)) is None:
        return
    heading = re.escape(language("card_metrics"))
    if section := re.search(rf"^## {heading}\n.*?(?=^## )", card, re.MULTILINE | re.DOTALL):
        told = _section("metrics", _metrics(metrics, language), language)
        write_whole(file, f"{card[: section.start()]}{told}\n\n{card[section.end() :]}")


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


def _summary(record: Mapping[str, Any], metrics: Mapping[str, Any], language: Language) -> str:
    base, lora = record["base_model"], record["lora"]
    merged = language(
        "card_merged_summary",
        name=base["name"],
        revision=_revision(base, language),
        r=lora["r"],
        alpha=lora["lora_alpha"],
        images=metrics["num_images"],
        base=f"{metrics['base']['CIDEr']:.3f}",
        tuned=f"{metrics['tuned']['CIDEr']:.3f}",
    )
    fingerprint = language("card_fingerprint", fingerprint=base["fingerprint"])
    return f"{merged}\n\n- {_run(record, language)}\n- {fingerprint}{_note(record, language)}"


def _note(record: Mapping[str, Any], language: Language) -> str:
    said = note_on_base(record, language)
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


def _use(record: Mapping[str, Any], kind: str, language: Language, *, thinks: bool) -> str:
    thinking = _NO_THINKING if thinks else ""
    sizes = {name: record["image"][name] for name in _SIZES if record["image"][name]}
    trained = TrainedPrompt.of_record(record["prompt"])
    asked = trained.choose()
    merged = "_merged" if kind == "merged" else ""
    if asked is None:
        which = f"{_trained_texts(trained, language)}\n\n{language(f'card_ask_yours{merged}', yours=_YOURS)}"
        user = None if trained.questions.is_one else _YOURS
        asked = trained.choose(user, None if trained.systems.is_one else _YOURS)
        assert asked is not None
    else:
        which = language(f"card_ask_as_trained{merged}")
    pictures = max(1, asked.user.count(IMAGE_SLOT))
    turns = ask_about("x", asked, pictures).turns
    messages = [{"role": role, "content": [_content(part) for part in parts]} for role, parts in turns]
    base = base_hub_id(record["base_model"]) or record["base_model"]["name"]
    generated = "" if kind == "merged" else ", ".join(["", *_greedy(record)])
    return f"""{which}

```python
from qwen_vl_utils import fetch_image
{_LOADS[kind].format(base=base)}
messages = {messages!r}
text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True{thinking})
{_fetched(pictures, sizes)}, do_resize=False, return_tensors="pt").to(model.device)
ids = model.generate(**inputs{generated})[:, inputs["input_ids"].shape[1] :]
print(processor.batch_decode(ids, skip_special_tokens=True)[0])
```"""


def _fetched(pictures: int, sizes: Mapping[str, Any]) -> str:
    """Lines that read one picture, or several, and begin to make the model's inputs."""
    patch = "image_patch_size=processor.image_processor.patch_size"
    if pictures == 1:
        return f"""picture = fetch_image({{"image": "picture.jpg", **{sizes!r}}}, {patch})
inputs = processor(text=[text], images=[picture]"""
    files = [f"picture_{number}.jpg" for number in range(1, pictures + 1)]
    return f"""pictures = [fetch_image({{"image": file, **{sizes!r}}}, {patch}) for file in {files!r}]
inputs = processor(text=[text], images=pictures"""


def _greedy(record: Mapping[str, Any]) -> list[str]:
    """Arguments of `generate` that give the captions of the evaluation: the base's own configuration may sample."""
    told = record["generation"]
    chosen = {"do_sample": False, **{name: told[name] for name in ("max_new_tokens", "repetition_penalty")}}
    return [f"{name}={value!r}" for name, value in chosen.items()]


def _content(part: Part) -> dict[str, str]:
    return {"type": "text", "text": part.text} if isinstance(part, TextPart) else {"type": "image"}


def _trained_texts(trained: TrainedPrompt, language: Language) -> str:
    """Lists of the questions and of the system texts, if there are several."""
    lines = []
    for name, counted in (("questions", trained.questions), ("systems", trained.systems)):
        if counted.is_one:
            continue
        lines.append(language(f"card_{name}", count=len(counted)) if counted else language(f"card_no_{name}"))
        for text, count in counted.texts:
            shown = json.dumps(text, ensure_ascii=False) if text is not None else language("card_own_system")
            lines.append(f"- {language('card_samples', text=shown, count=count)}")
        if counted.others:
            lines.append(f"- {language('card_more', count=counted.others)}")
    return "\n".join(lines)


def _metrics(metrics: Mapping[str, Any], language: Language) -> str:
    ranges = "_ranges" if metrics.get("confidence") else ""
    rows = [
        f"| {name} | {_value(metrics, 'base', name, language)} | {_value(metrics, 'tuned', name, language)} | "
        f"{_value(metrics, 'delta', name, language, '+')} |"
        for name in metrics["base"]
    ]
    if exact := metrics.get("exact_match"):
        points = language("card_points", points=f"{100 * (exact['tuned'] - exact['base']):+.0f}")
        rows.append(f"| {language('card_exact_match')} | {exact['base']:.0%} | {exact['tuned']:.0%} | {points} |")
    head = language(f"card_metrics_head{ranges}", images=metrics["num_images"], tokenizer=metrics["tokenizer"])
    return "\n".join(
        [
            head,
            "",
            language("card_table"),
            "|---|---|---|---|",
            *rows,
            *_contenders(metrics, language),
            *_judged(metrics, language),
        ]
    )


def _judged(metrics: Mapping[str, Any], language: Language) -> Iterator[str]:
    """A line for each side that a judge compared with this adapter's captions."""
    judge = metrics.get("judge", {})
    for place, (side, found) in enumerate(judge.get("against", {}).items()):
        if found["tuned_share"] is not None:
            share, low, high = (f"{value:.0%}" for value in (found["tuned_share"], *found["interval"]))
            counts = {name: found[name] for name in ("tuned_wins", "ties", "judged")}
            yield from [] if place else [""]
            told = language("card_judged", judge=judge["model"], side=side, share=share, low=low, high=high, **counts)
            yield f"- {told}"


def _contenders(metrics: Mapping[str, Any], language: Language) -> Iterator[str]:
    """Lines of what else captioned the same pictures."""
    if "contenders" not in metrics:
        return
    yield from ("", language("card_contenders"), "", language("card_contenders_table"), "|---|---|---|---|")
    for name, found in metrics["contenders"].items():
        interval = {"confidence": metrics["confidence"]["contenders"][name], **found}
        exact = f"{metrics['exact_match'][name]:.0%}"
        score, delta = (
            _value(interval, key, "CIDEr", language, sign) for key, sign in (("scores", ""), ("delta", "+"))
        )
        yield f"| {name} | {score} | {exact} | {delta} |"


def _value(metrics: Mapping[str, Any], side: str, name: str, language: Language, sign: str = "") -> str:
    low, high = metrics["confidence"][side][name] if "confidence" in metrics else (None, None)
    interval = "" if low is None else language("card_range", low=f"{low:{sign}.3f}", high=f"{high:{sign}.3f}")
    return f"{metrics[side][name]:{sign}.3f}{interval}"


def _data(record: Mapping[str, Any], language: Language) -> str:
    data, read = record["data"], record.get("run", {}).get("read", {})
    lines = [
        language("card_samples_in", count=data[name]["samples"], name=name, sha256=data[name]["sha256"])
        for name in sorted(data)
    ]
    lines += [
        language("card_version", name=name, version=read[name]["version"])
        for name in sorted(read)
        if read[name].get("version")
    ]
    return "\n".join(f"- {line}" for line in lines)


def _settings(record: Mapping[str, Any]) -> str:
    names = ("prompt", "image", "generation", "max_length", "vision", "rows", "lora", "training_args")
    told = json.dumps({name: record[name] for name in names}, indent=2, ensure_ascii=False)
    return f"```json\n{told}\n```"


def _merging(check: MergeCheck, quantization: str | None, language: Language) -> str:
    figures = {name: f"{getattr(check, name):.2e}" for name in ("error", "effect")}
    checked = language("card_merge_check", dtype=check.dtype, tolerance=f"{check.tolerance:.0e}", **figures)
    return language.prose(
        [language("card_quantized", quantization=quantization), checked] if quantization else [checked]
    )


def _licences(stated: str | None, kind: str, language: Language) -> str:
    base = f"`{stated}`" if stated else language("card_licence_unstated")
    lines = language(f"card_licence_{kind}", licence=base), language("card_licence_data"), language("card_made_by")
    return "\n".join(f"- {line}" for line in lines)


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
