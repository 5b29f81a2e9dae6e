"""What Kedro-Viz shows of artifacts for which stock datasets have no preview, or too large a one.

Kedro-Viz picks its renderer from the return annotation of `preview`. The first classes stand behind
`ArtifactDataset` in the catalog, the others are the project's own datasets with a card.
"""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kedro_datasets._typing import HTMLPreview, ImagePreview, JSONPreview, TablePreview
from kedro_datasets.json import JSONDataset
from kedro_datasets.pillow import ImageDataset
from kedro_datasets.text import TextDataset

from qwen_vl_lora.datasets.adapter import AdapterDataset, StagedDirectoryDataset
from qwen_vl_lora.datasets.base_model import BaseModelDataset
from qwen_vl_lora.datasets.images import ImageStoreDataset
from qwen_vl_lora.modeling.base_model import BaseModel
from qwen_vl_lora.modeling.fingerprints import stored_tensors
from qwen_vl_lora.samples.image_store import MANIFEST_COLUMNS
from qwen_vl_lora.samples.record_files import write_records

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
    """`json.JSONDataset` for long lists: one record a line, and the preview holds the first records only.

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

    def save(self, data: list[Any]) -> None:
        write_records(data, Path(self._get_save_path()))

    def preview(self, nrows: int = 5) -> JSONPreview:
        """The first `nrows` records."""
        return JSONPreview(json.dumps(self.load()[:nrows], ensure_ascii=False))


class ReportDataset(TextDataset):
    """`text.TextDataset` for the before/after page: the preview holds its headline, metrics and first captions.

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
    """Headline, metrics and the first cards of the report, as bare markup.

    Kedro-Viz reads HTML as Markdown too: underscores and asterisks become look-alikes, lines are joined.
    """
    body = page.partition("<body>")[2]
    *cards, _ = body.split("</article>")[: NUM_CARDS + 1]
    shown = "</article>".join([*cards, ""])
    shown = re.sub(r"<(form|details|dl class=\"entries\")\b.*?</(form|details|dl)>", "", shown, flags=re.DOTALL)
    shown = re.sub(r"<a class=\"skip\".*?</a>|<td class=\"bars\".*?</td>", "", shown, flags=re.DOTALL)
    shown = re.sub(r"<span class=\"interval\">(.*?)</span>", r" (\1)", shown, flags=re.DOTALL)
    shown = re.sub(r" (class|id|role|tabindex|aria-[a-z]+|data-[a-z]+)=\"[^\"]*\"", "", shown)
    shown = " ".join(shown.split()).replace("_", "\u02cd").replace("*", "\u2217")
    return shown.replace("<img ", '<img style="max-width: 160px" ')


class AdapterCardDataset(AdapterDataset):
    """An adapter with a card of what made it.

    ```yaml
    adapter:
      type: qwen_vl_lora.datasets.previews.AdapterCardDataset
      filepath: data/06_models/tiny/adapter
      versioned: true
    ```

    ```python
    AdapterCardDataset(filepath="data/06_models/tiny/adapter", version=Version(None, None)).preview()
    ```
    """

    def preview(self) -> TablePreview:
        """Base, question, picture size, LoRA, training, and the versions that it was trained on."""
        record = self.load().record
        lora, image, training = (record[key] for key in ("lora", "image", "training"))
        run = record.get("run", {})
        size = f"{image['resized_height']} x {image['resized_width']}"
        limits = f"{image['min_pixels']} to {image['max_pixels']} pixels"
        facts = {
            "base model": record["base_model"]["name"],
            "prompt": record["prompt"]["user"],
            "picture size": size if image["resized_height"] else limits,
            "LoRA": f"r {lora['r']}, lora_alpha {lora['lora_alpha']}, lora_dropout {lora['lora_dropout']}",
            "target modules": ", ".join(lora["target_modules"]),
            "vision tower": record["vision"],
            **{name.replace("_", " "): value for name, value in training.items() if value is not None},
            "run": run.get("id", "none: made outside of a run"),
            **{
                f"read: {name}": read["version"]
                for name, read in sorted(run.get("read", {}).items())
                if read["version"]
            },
        }
        return fact_table(facts)


class ImageTableDataset(ImageStoreDataset):
    """The image store with the first lines of its manifest.

    ```yaml
    images:
      type: qwen_vl_lora.datasets.previews.ImageTableDataset
      filepath: data/02_intermediate/tiny/images/manifest.csv
      versioned: true
    ```

    ```python
    ImageTableDataset(filepath="data/02_intermediate/tiny/images/manifest.csv").preview(nrows=3)
    ```
    """

    def preview(self, nrows: int = 20) -> TablePreview:
        """The first `nrows` pictures: id, sha256, path, size."""
        entries = self.load().entries[:nrows]
        rows = [[getattr(entry, column) for column in MANIFEST_COLUMNS] for entry in entries]
        return TablePreview({"index": list(range(len(rows))), "columns": list(MANIFEST_COLUMNS), "data": rows})


class BaseModelCardDataset(BaseModelDataset):
    """The base model with a card of its size and shape.

    ```yaml
    base_model:
      type: qwen_vl_lora.datasets.previews.BaseModelCardDataset
      model: data/06_models/tiny_qwen2_vl
    ```

    ```python
    BaseModelCardDataset(model="data/06_models/tiny_qwen2_vl").preview()
    ```
    """

    def preview(self) -> TablePreview:
        """Read from config.json and the weights' headers. Downloads nothing: looking must not cost 15 GB."""
        if not self._exists():
            return fact_table({**self._describe(), "state": "not here yet; the first run that needs it fetches it"})
        return fact_table(model_facts(self.load()))


class ModelDirectoryDataset(StagedDirectoryDataset):
    """A model directory that a pipeline writes, with the same card.

    ```yaml
    merged_model:
      type: qwen_vl_lora.datasets.previews.ModelDirectoryDataset
      filepath: data/06_models/tiny/merged_model
      versioned: true
    ```

    ```python
    ModelDirectoryDataset(filepath="data/06_models/tiny_qwen2_vl").preview()
    ```
    """

    def preview(self) -> TablePreview:
        """Read from config.json and the weights' headers."""
        path: Path = self.load()
        return fact_table(model_facts(BaseModel(name=path.name, path=path)))


def model_facts(model: BaseModel) -> dict[str, Any]:
    """Family, shape and size of a model on disk, without its weights in memory."""
    text, vision = model.config.get("text_config", model.config), model.config["vision_config"]
    tensors = [tensor for path in model.weight_files for tensor in stored_tensors(path)]
    dtypes = sorted({tensor.dtype for tensor in tensors})
    return {
        "name": model.name,
        "revision": model.revision or "none: a plain folder",
        "family": model.family,
        "parameters": f"{sum(_count(tensor.shape) for tensor in tensors) / 1e6:,.1f} million",
        "stored as": f"{', '.join(dtypes)}, {sum(t.stop - t.start for t in tensors) / 2**20:,.1f} MiB",
        "language model": f"{text['num_hidden_layers']} layers of {text['hidden_size']}",
        "vision tower": f"{vision['depth']} layers",
        "vocabulary": f"{text['vocab_size']:,}",
    }


def _count(shape: tuple[int, ...]) -> int:
    size = 1
    for side in shape:
        size *= side
    return size


def fact_table(facts: Mapping[str, Any]) -> TablePreview:
    """Names and values, a row each."""
    rows = [[name, str(value)] for name, value in facts.items()]
    return TablePreview({"index": list(range(len(rows))), "columns": ["fact", "value"], "data": rows})
