"""The `adapter` catalog entry: a PEFT directory with its record."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from kedro_datasets._typing import TablePreview

from qwen_vl_lora.datasets.artifacts import AtomicVersionedDataset
from qwen_vl_lora.datasets.base_model import fact_table, model_facts
from qwen_vl_lora.model.adapter import Adapter, note_run
from qwen_vl_lora.model.base_model import BaseModel
from qwen_vl_lora.model.model_card import note_metrics, write_adapter_card
from qwen_vl_lora.runs.run import Artifact, Run, current_run
from qwen_vl_lora.runs.storage import move
from qwen_vl_lora.runs.surroundings import describe_computing

logger = logging.getLogger(__name__)

_FACTS = (
    "recipe",
    "pipelines",
    "env",
    "started",
    "git",
    "code_sha256",
    "packages",
    "python",
    "platform",
    "parameters",
    "made_from",
)


class StagedDirectoryDataset(AtomicVersionedDataset):
    """A directory that a node built in the workspace and this dataset moves into place.

    ```yaml
    tiny_base:
      type: qwen_vl_lora.datasets.adapter.StagedDirectoryDataset
      filepath: data/06_models/tiny_qwen2_vl
    ```

    ```python
    StagedDirectoryDataset(filepath="data/06_models/tiny_qwen2_vl").save(Path("data/09_workspace/tiny/base"))
    ```
    """

    def preview(self) -> TablePreview:
        """Read from config.json and the weights' headers."""
        path: Path = self.load()
        return fact_table(model_facts(BaseModel(name=path.name, path=path)))

    def _write(self, data: Path, path: Path) -> None:
        move(data, path)

    def _read(self, path: Path) -> Any:
        return path


class AdapterDataset(StagedDirectoryDataset):
    """A LoRA adapter: loads as a handle, saves a staged directory.

    ```yaml
    adapter:
      type: qwen_vl_lora.datasets.adapter.AdapterDataset
      filepath: data/06_models/tiny/adapter
      versioned: true
    ```

    ```python
    AdapterDataset(filepath="data/06_models/tiny/adapter", version=Version(None, None)).load().record
    ```
    """

    _is_left_out = False

    def leave_out(self) -> None:
        """Be no adapter: it loads as None, has no versions and leaves no line in a record."""
        self._is_left_out = True

    def load(self) -> Adapter | None:
        return None if self._is_left_out else super().load()

    def versions(self) -> list[str]:
        return [] if self._is_left_out else super().versions()

    def describe_artifact(self, name: str, data: Any, root: Path) -> Artifact | None:
        return None if self._is_left_out else super().describe_artifact(name, data, root)

    def check(self) -> None:
        """Refuse a missing or damaged adapter before any node runs. Reads no weights.

        Raises:
            MissingArtifactError: if the version, or the record in it, is not there.
            AdapterError: if a file in it cannot be used.
        """
        if self._is_left_out:
            return
        self._read(self.existing_path()).check_files()

    def preview(self) -> TablePreview:
        """Base, question, picture size, LoRA, training, and the versions that it was trained on."""
        adapter = self._read(self.existing_path())
        record, asked = adapter.record, adapter.trained_prompt.questions
        lora, image, training = (record[key] for key in ("lora", "image", "training"))
        run = record.get("run", {})
        size = f"{image['resized_height']} x {image['resized_width']}"
        limits = f"{image['min_pixels']} to {image['max_pixels']} pixels"
        facts = {
            "base model": record["base_model"]["name"],
            "prompt": asked.texts[0][0] if asked.is_one else asked.shown(),
            "picture size": size if image["resized_height"] else limits,
            "LoRA": f"r {lora['r']}, lora_alpha {lora['lora_alpha']}, lora_dropout {lora['lora_dropout']}",
            "target modules": ", ".join(lora["target_modules"]),
            "vision tower": record["vision"],
            **{
                name.replace("_", " "): value
                for name, value in training.items()
                if value is not None and name != "curve"
            },
            "run": run.get("id", "none: made outside of a run"),
            **{
                f"read: {name}": read["version"]
                for name, read in sorted(run.get("read", {}).items())
                if read["version"]
            },
        }
        return fact_table(facts)

    def describe_metrics(self, metrics: dict[str, Any]) -> None:
        """Write the metrics of an evaluation into the README of the adapter that was evaluated."""
        path = self.existing_path()
        try:
            note_metrics(path, metrics)
        except OSError as error:  # an adapter of a read-only folder is evaluated too
            logger.warning("The README of %s was not written: %s.", path, error)

    def _read(self, path: Path) -> Adapter:
        return Adapter(path)

    def _write(self, data: Path, path: Path) -> None:
        run = current_run()
        if run is not None:
            note_run(data, made_by(run))
            write_adapter_card(data)
        super()._write(data, path)


def made_by(run: Run) -> dict[str, Any]:
    """What `adapter_record.json` says of the run: enough to know what made the adapter without the project at hand.

    One version and hash for each dataset; the hash of a folder covers its files, which `record.json` lists.
    """
    facts = {name: run.facts[name] for name in _FACTS if name in run.facts}
    facts |= describe_computing(run.facts.get("parameters", {}).get("device", "auto"))
    read = {name: {k: v for k, v in artifact.items() if k != "files"} for name, artifact in run.read.items()}
    return {"id": run.id, **facts, "read": read}
