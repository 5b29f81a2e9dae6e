"""Sources as read-only catalog entries: what `captioned_images` may be.

`load` returns rows that are read when they are iterated, again for every iteration.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from kedro.io import AbstractDataset, DatasetError

from qwen_vl_lora.exceptions import MissingArtifactError
from qwen_vl_lora.samples.records import Rejection, SourceSample
from qwen_vl_lora.samples.sources import FORMS, CaptionsFile, CocoCaptions, require_file

Rows = Iterable[SourceSample | Rejection]


class SourceDataset(AbstractDataset[None, Rows]):
    """What all sources share: they are read, never written."""

    @abstractmethod
    def load(self) -> Rows: ...

    def save(self, data: None) -> NoReturn:  # AbstractDataset names the argument
        raise DatasetError(f"{type(self).__name__} is a source: it is read only.")


class ScenesDataset(SourceDataset):
    """Pictures that the project draws itself, with terse captions: the embedded default.

    ```yaml
    captioned_images:
      type: qwen_vl_lora.datasets.sources.ScenesDataset
      num_images: 600
      seed: 0
    ```

    ```python
    next(iter(ScenesDataset(num_images=600, seed=0).load()))
    ```
    """

    def __init__(self, *, num_images: int, seed: int, metadata: dict[str, Any] | None = None) -> None:
        self.metadata = metadata
        self._num_images = num_images
        self._seed = seed

    def load(self) -> Rows:
        from qwen_vl_lora.scenes.source import draw_captioned_scenes

        return _Repeatable(lambda: iter(draw_captioned_scenes(self._num_images, self._seed)))

    def _exists(self) -> bool:
        return True

    def _describe(self) -> dict[str, Any]:
        return {"num_images": self._num_images, "seed": self._seed}


class CaptionsFileDataset(SourceDataset):
    """Anybody's captions in one file: CSV, the tutorials' JSON, LLaVA or ShareGPT JSON, or JSON Lines.

    The form is recognised by content. Image paths are relative to the file. Without `filepath` the
    catalog still loads, and only reading the entry fails.

    ```yaml
    captioned_images:
      type: qwen_vl_lora.datasets.sources.CaptionsFileDataset
      filepath: ${runtime_params:captions_file, null}
    ```

    ```python
    next(iter(CaptionsFileDataset(filepath="my_pictures/captions.csv").load()))
    ```
    """

    def __init__(self, *, filepath: str | None, metadata: dict[str, Any] | None = None) -> None:
        self.metadata = metadata
        self._filepath = filepath

    def load(self) -> CaptionsFile:
        file = require_path(self._filepath, FORMS)
        require_file(file, FORMS)
        return CaptionsFile(file)

    def _exists(self) -> bool:
        return bool(self._filepath) and expand_home(self._filepath or "").is_file()

    def _describe(self) -> dict[str, Any]:
        return {"filepath": self._filepath}


class CocoCaptionsDataset(SourceDataset):
    """Official COCO files: a captions JSON and the folder of its pictures, relative to that file.

    ```yaml
    captioned_images:
      type: qwen_vl_lora.datasets.sources.CocoCaptionsDataset
      filepath: data/01_raw/coco/annotations/captions_train2014.json
      image_folder: ../train2014
    ```

    ```python
    CocoCaptionsDataset(filepath="coco/annotations/captions_val2014.json", image_folder="../val2014").load()
    ```
    """

    def __init__(self, *, filepath: str | None, image_folder: str, metadata: dict[str, Any] | None = None) -> None:
        self.metadata = metadata
        self._filepath = filepath
        self._image_folder = image_folder

    def load(self) -> CocoCaptions:
        what = "a COCO captions file such as captions_train2014.json"
        file = require_path(self._filepath, what)
        require_file(file, what)
        return CocoCaptions(file, file.parent / Path(self._image_folder).expanduser())

    def _exists(self) -> bool:
        return bool(self._filepath) and expand_home(self._filepath or "").is_file()

    def _describe(self) -> dict[str, Any]:
        return {"filepath": self._filepath, "image_folder": self._image_folder}


@dataclass(frozen=True)
class _Repeatable:
    """Rows that are made afresh for every iteration."""

    make: Callable[[], Iterator[SourceSample | Rejection]]

    def __iter__(self) -> Iterator[SourceSample | Rejection]:
        return self.make()


def require_path(filepath: str | None, what: str) -> Path:
    """Raises: MissingArtifactError, saying what to give, when no path was given."""
    if not filepath:
        raise MissingArtifactError(
            "`captioned_images` has no file. Give yours on the command line: "
            f'kedro run --params "captions_file=path/to/captions.csv". Required is {what}.'
        )
    return expand_home(filepath)


def expand_home(filepath: str) -> Path:
    """A path whose `~` is the user's folder: a shell leaves the one of `captions_file=~/…` as it is."""
    _, home, behind = filepath.rpartition("/~/")  # Kedro puts the project's folder before a relative path
    return Path(f"~/{behind}" if home else filepath).expanduser()
