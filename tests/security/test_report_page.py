"""Whatever texts reach the report, the page has the tags of a harmless one: `build_report` from end to end.

Fails when `autoescape=True` is taken out of evaluation/report.py, or `| safe` put behind any value of report.html.
"""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import yaml

from evaluation.test_report import Page
from qwen_vl_lora.evaluation.metrics import score_predictions
from qwen_vl_lora.model.adapter import Adapter
from qwen_vl_lora.parameters import ScoringParameters, validate_parameters
from qwen_vl_lora.pipelines.evaluation.nodes import build_report
from tiny_adapters import LORA, SHA256, adapter_record, write_record

HARMLESS = "a dog"
ATTACKS = [
    "<script>alert(1)</script>",
    "</script><script>alert(1)</script>",
    "</style><script>alert(1)</script>",
    "</title><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    '" autofocus onfocus="alert(1)',
    "<svg/onload=alert(1)>",
    "<iframe srcdoc='<script>alert(1)</script>'>",
    "<a href='javascript:alert(1)'>x</a>",
    "<base href='https://evil.example/'>",
    "<meta http-equiv=refresh content='0;url=https://evil.example'>",
    "<form action=https://evil.example><input name=x>",
    "<link rel=stylesheet href=https://evil.example/x.css>",
    "<!-- <script>",
    "--><script>alert(1)</script>",
    "]]><script>alert(1)</script>",
    "&lt;script&gt;alert(1)&lt;/script&gt;",
    "{{ 7 * 7 }}{% raw %}{{ config }}",
    "{{ ''.__class__.__mro__ }}",
    "${7*7}",
    "<mark class=extra>x</mark>",
    "\u202ereversed\u202c <b>bold</b>",
    "\u2028<script>alert(1)</script>",
    "<plaintext>",
]


class NoImages:
    """A store in which every picture is gone."""

    def by_path(self, path: str):
        raise LookupError(path)


def page_of(text: str, folder, language: str) -> tuple[str, Page]:
    table = pd.DataFrame(
        {
            "image_id": [text],
            "image_path": [text],
            "prompt": [text],
            "references": [json.dumps([f"{text} one", f"{text} two"])],
            "base_caption": [text],
            "tuned_caption": [f"{text} one"],
        }
    )
    metrics, scores = score_predictions(
        table, ScoringParameters(tokenizer="ptb", bootstrap_samples=5, seed=0, settings_from="parameters")
    )
    settings = {text: {text: [text, {text: text}]}}
    split = {"sha256": text, "samples": 1, **settings}
    record = adapter_record(
        base_model={"name": text, "revision": text, "fingerprint": SHA256},
        lora={**LORA.model_dump(), "target_modules": [text], **settings},
        prompt={"user": text, "system": text, "override": False, **settings},
        training={"trainable_parameters": 1, **settings},
        training_args={"bf16": False, "fp16": False, **settings},
        data={"train_conversations": split, "validation_conversations": split, **settings},
        run={"id": text, "recipe": text, "read": {text: {"version": text, **settings}}},
        rows=text,
    )
    folder.mkdir()
    write_record(folder, record)
    summary = {"samples": 1, "rows": 2, "rejected": {text: 1}, "ignored_keys": {text: 1}, "forms": {}, "suspicious": []}
    statistics = {"collection": summary}
    tree = yaml.safe_load((Path(__file__).parents[2] / "conf/base/parameters.yml").read_text(encoding="utf-8"))
    parameters = validate_parameters({**tree, "report": {"language": language}})
    found = {**metrics, "tokenizer": text}
    html, _, _ = build_report(table, found, scores, NoImages(), Adapter(folder), statistics, parameters)
    return html, Page(html)


def shape(page: Page) -> set[tuple[str, frozenset[str]]]:
    return {(tag, frozenset(attributes)) for tag, attributes in page.tags}


@pytest.mark.parametrize("attack", ATTACKS)
def test_hostile_texts_add_no_tag_and_no_attribute(tmp_path, attack):
    language = "en" if ATTACKS.index(attack) % 2 else "zh"
    _, harmless = page_of(HARMLESS, tmp_path / "harmless", language)
    html, page = page_of(attack, tmp_path / "hostile", language)
    # A word that differs is marked, and a harmless text may have none.
    allowed = shape(harmless) | {("mark", frozenset({"class"}))}
    assert shape(page) <= allowed
    assert len(page.all("script")) == len(harmless.all("script")) == 1
    assert len(page.tags) - len(page.all("mark")) == len(harmless.tags) - len(harmless.all("mark"))
    assert attack in page.text
    assert html.count("<script") == 1
