"""The `adapter` catalog entry: a PEFT directory with its record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qwen_vl_lora.datasets.artifacts import AtomicVersionedDataset
from qwen_vl_lora.lineage.run import Run, current_run
from qwen_vl_lora.lineage.surroundings import describe_computing
from qwen_vl_lora.modeling.adapter import Adapter, note_run

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

    def _write(self, data: Path, path: Path) -> None:
        data.rename(path)

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

    def _read(self, path: Path) -> Adapter:
        return Adapter(path)

    def _write(self, data: Path, path: Path) -> None:
        run = current_run()
        if run is not None:
            note_run(data, made_by(run))
        super()._write(data, path)


def made_by(run: Run) -> dict[str, Any]:
    """What `adapter_record.json` says of the run: enough to know what made the adapter without the project at hand.

    One version and hash for each dataset; the hash of a folder covers its files, which `record.json` lists.
    """
    facts = {name: run.facts[name] for name in _FACTS if name in run.facts}
    facts |= describe_computing(run.facts.get("parameters", {}).get("device", "auto"))
    read = {name: {k: v for k, v in artifact.items() if k != "files"} for name, artifact in run.read.items()}
    return {"id": run.id, **facts, "read": read}
