"""Stock Kedro datasets with a preview, or with a smaller one. They stand behind `ArtifactDataset` in the catalog.

Kedro-Viz picks its renderer from the return annotation of `preview`. The project's own datasets have their previews
themselves; the last lines keep the names that catalogs give them.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from kedro_datasets._typing import HTMLPreview, ImagePreview, JSONPreview
from kedro_datasets.json import JSONDataset
from kedro_datasets.pillow import ImageDataset
from kedro_datasets.text import TextDataset

from qwen_vl_lora.datasets.adapter import AdapterDataset, StagedDirectoryDataset
from qwen_vl_lora.datasets.base_model import BaseModelDataset
from qwen_vl_lora.datasets.images import ImageStoreDataset
from qwen_vl_lora.samples.record_files import open_records, write_records

PICTURE_SIDE = 1400
"""px; a larger sheet is shrunk, so that a page with every preview stays a few MB."""

NUM_CARDS = 8
"""Captions of the report that its preview shows; the page itself shows all."""


class PictureDataset(ImageDataset):
    """`pillow.ImageDataset` with a preview.

    ```yaml
    image_sheet:
      type: qwen_vl_lora.datasets.artifacts.ArtifactDataset
      dataset: qwen_vl_lora.datasets.previews.PictureDataset
      filepath: data/08_reporting/tiny/image_sheet.png
    ```

    ```python
    PictureDataset(filepath="image_sheet.png").preview()
    ```
    """

    def preview(self) -> ImagePreview:
        """The picture as base64 PNG."""
        with self.load() as picture:
            shown = picture.convert("RGB")
        shown.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
        buffer = io.BytesIO()
        shown.save(buffer, "PNG", optimize=True)
        return ImagePreview(base64.b64encode(buffer.getvalue()).decode())


class RecordsDataset(JSONDataset):
    """`json.JSONDataset` for long lists: one record a line, each parsed when it is asked for.

    It loads a `Records`: a sequence that is equal to the list, and takes 16 bytes of memory for a record. `list(…)`
    makes a list of it. A file of another layout is read as a whole. The preview holds the first records only.

    ```yaml
    conversations:
      type: qwen_vl_lora.datasets.artifacts.ArtifactDataset
      dataset: {type: qwen_vl_lora.datasets.previews.RecordsDataset}
      filepath: data/03_primary/tiny/conversations.json
      metadata: {kedro-viz: {preview_args: {nrows: 5}}}
    ```

    ```python
    RecordsDataset(filepath="conversations.json").preview(nrows=2)
    ```
    """

    def load(self) -> Any:
        return open_records(Path(self._get_load_path()))

    def save(self, data: Iterable[Any]) -> None:
        write_records(data, Path(self._get_save_path()))

    def preview(self, nrows: int = 5) -> JSONPreview:
        """The first `nrows` records."""
        return JSONPreview(json.dumps(self.load()[:nrows], ensure_ascii=False))


class ReportDataset(TextDataset):
    """`text.TextDataset` for the HTML pages: the preview holds the headline, the figures and the first cards.

    ```yaml
    comparison_report:
      type: qwen_vl_lora.datasets.artifacts.ArtifactDataset
      dataset: qwen_vl_lora.datasets.previews.ReportDataset
      filepath: data/08_reporting/tiny/comparison_report.html
    ```

    ```python
    ReportDataset(filepath="comparison_report.html").preview()
    ```
    """

    def preview(self) -> HTMLPreview:
        """Markup without styles, scripts and classes, which would act on the page around it."""
        return HTMLPreview(excerpt(self.load()))


def excerpt(page: str) -> str:
    """Headline, metrics and the first cards of a page, as bare markup.

    Kedro-Viz reads HTML as Markdown too: underscores and asterisks become look-alikes, lines are joined.
    """
    reader = _Excerpt()
    reader.feed(page.partition("<body>")[2])
    return " ".join("".join(reader.parts).split())


class _Excerpt(HTMLParser):
    """Collects the markup that only shows, up to the last card of the excerpt."""

    _TEXT_TAGS = ("h1", "h2", "h3", "p", "strong", "em", "mark", "code", "dl", "dt", "dd", "br")
    _TABLE_TAGS = ("table", "thead", "tbody", "tr", "th", "td")
    _TAGS = frozenset(
        ("header", "main", "section", "article", "figure", "figcaption", "div", *_TEXT_TAGS, *_TABLE_TAGS)
    )
    _LEFT_OUT = frozenset(("script", "style", "dialog", "form", "details", "svg", "footer"))
    _LEFT_OUT_CLASSES = frozenset(("skip", "bars", "histograms", "entries"))
    _EMPTY = frozenset(("img", "br", "input", "line", "circle", "polyline", "link", "meta"))

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._num_cards = 0
        self._skipped = 0  # depth inside of an element that is left out
        self._spans: list[bool] = []  # whether each open span is an interval

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        is_left_out = tag in self._LEFT_OUT or given.get("class") in self._LEFT_OUT_CLASSES
        if self._skipped or is_left_out or self._num_cards == NUM_CARDS:
            self._skipped += tag not in self._EMPTY
            return
        if tag == "span":
            self._spans.append(given.get("class") == "interval")
            self.parts.append(" (" if self._spans[-1] else "")
        elif tag == "img":
            source, alt = escape(given.get("src") or ""), _plain(given.get("alt") or "")
            self.parts.append(f'<img style="max-width: 160px" src="{source}" alt="{alt}">')
        elif tag in self._TAGS:
            self.parts.append(f"<{tag}>")

    def handle_endtag(self, tag: str) -> None:
        if self._skipped:
            self._skipped -= tag not in self._EMPTY
        elif tag == "span":
            self.parts.append(")" if self._spans.pop() else "")
        elif tag in self._TAGS:
            self.parts.append(f"</{tag}>")
            self._num_cards += tag == "article"

    def handle_data(self, data: str) -> None:
        if not self._skipped:
            self.parts.append(_plain(data))


def _plain(text: str) -> str:
    return escape(text).replace("_", "\u02cd").replace("*", "\u2217")


AdapterCardDataset = AdapterDataset
BaseModelCardDataset = BaseModelDataset
ImageTableDataset = ImageStoreDataset
ModelDirectoryDataset = StagedDirectoryDataset
