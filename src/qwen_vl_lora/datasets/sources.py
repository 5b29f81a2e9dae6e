"""Sources as read-only catalog entries: what `captioned_images` may be.

`load` returns rows that are read when they are iterated, again for every iteration.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from kedro.io import AbstractDataset, DatasetError

from qwen_vl_lora.exceptions import DataFormatError, MissingArtifactError
from qwen_vl_lora.hub.s3 import Bucket, parse_s3
from qwen_vl_lora.runs.given_command import repeated
from qwen_vl_lora.samples.records import Row
from qwen_vl_lora.samples.source import GivenRows, Source
from qwen_vl_lora.samples.sources import FORMS, CaptionsFile, require_file


class SourceDataset(AbstractDataset[None, Source]):
    """What all sources share: they are read, never written."""

    @abstractmethod
    def load(self) -> Source: ...

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

    def load(self) -> Source:
        from qwen_vl_lora.tiny.source import draw_captioned_scenes

        return GivenRows(_Repeatable(lambda: iter(draw_captioned_scenes(self._num_images, self._seed))))

    def _exists(self) -> bool:
        return True

    def _describe(self) -> dict[str, Any]:
        return {"num_images": self._num_images, "seed": self._seed}


class CaptionsFileDataset(SourceDataset):
    """Anybody's captions: a file of any common form, a folder, or several of them.

    The form is recognised by content; see docs/own-data.md. Without `filepath` the catalog still loads, and only
    reading the entry fails.

    ```yaml
    captioned_images:
      type: qwen_vl_lora.datasets.sources.CaptionsFileDataset
      filepath: ${runtime_params:captions_file, null}
      image_folder: ${runtime_params:image_folder, null}   # where relative paths start; null is the file's own folder
    ```

    Several sources, each with its own folder of pictures and number of rows if it needs them:

    ```yaml
    captioned_images:
      type: qwen_vl_lora.datasets.sources.CaptionsFileDataset
      filepath:
        - my_pictures/captions.csv
        - {name: coco, filepath: coco/captions_train2014.json, image_folder: coco/train2014, num_rows: 1000}
    ```

    ```python
    next(iter(CaptionsFileDataset(filepath="my_pictures/captions.csv").load()))
    ```
    """

    def __init__(
        self,
        *,
        filepath: str | Sequence[str | Mapping[str, Any]] | None,
        image_folder: str | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        self.metadata = metadata
        self._filepath = filepath
        self._image_folder = image_folder

    def load(self) -> Source:
        from qwen_vl_lora.samples.folders import Several
        from qwen_vl_lora.samples.places import open_place

        if not self._filepath or isinstance(self._filepath, str):
            path = self._filepath if isinstance(self._filepath, str) else None
            return open_place(str(require_path(path, FORMS)), _folder(self._image_folder))
        parts = [self._part(number, given) for number, given in enumerate(self._filepath, start=1)]
        names = [name for name, _, _ in parts]
        if len(set(names)) < len(names):
            raise DataFormatError(f"captioned_images: two sources have one name: {', '.join(names)}. Give each `name`.")
        return Several(tuple(parts))

    def check(self) -> None:
        """Refuse before any node runs what has to come from a hub and cannot."""
        if self.needs_network():
            self.load().check()

    def needs_network(self) -> bool:
        """Whether a source is a data set on a hub."""
        return bool(self._filepath) and not self.load().is_local

    def _part(self, number: int, given: str | Mapping[str, Any]) -> tuple[str, Source, int | None]:
        from qwen_vl_lora.samples.places import open_place

        entry = {"filepath": given} if isinstance(given, str) else dict(given)
        unknown = set(entry) - {"filepath", "image_folder", "num_rows", "name"}
        if unknown or not isinstance(entry.get("filepath"), str):
            raise DataFormatError(
                f"captioned_images: source {number} must be a path, or filepath with image_folder, num_rows and name; "
                f"got {dict(entry)!r}."
            )
        num_rows = entry.get("num_rows")
        if num_rows is not None and (not isinstance(num_rows, int) or isinstance(num_rows, bool) or num_rows < 1):
            raise DataFormatError(f"captioned_images: num_rows of source {number} must be 1 or more; got {num_rows!r}.")
        path = expand_home(entry["filepath"])
        name = re.sub(r"[^\w-]+", "-", str(entry.get("name") or path.stem)).strip("-") or f"source{number}"
        return name, open_place(str(path), _folder(entry.get("image_folder"))), num_rows

    def _exists(self) -> bool:
        return isinstance(self._filepath, str) and bool(self._filepath) and expand_home(self._filepath).exists()

    def _describe(self) -> dict[str, Any]:
        return {"filepath": self._filepath, "image_folder": self._image_folder}


def _folder(given: str | None) -> Path | None:
    """A folder of pictures; on S3, the folder that stands for it on this machine."""
    stored = None if given is None else parse_s3(given)
    if stored is not None:
        bucket, key = stored
        return Bucket(bucket).folder / key
    return None if given is None else expand_home(given)


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

    def load(self) -> CaptionsFile:
        what = "a COCO captions file such as captions_train2014.json"
        file = require_path(self._filepath, what)
        require_file(file, what)
        return CaptionsFile(file, file.parent / Path(self._image_folder).expanduser())

    def _exists(self) -> bool:
        return bool(self._filepath) and expand_home(self._filepath or "").is_file()

    def _describe(self) -> dict[str, Any]:
        return {"filepath": self._filepath, "image_folder": self._image_folder}


@dataclass(frozen=True)
class _Repeatable:
    """Rows that are made afresh for every iteration."""

    make: Callable[[], Iterator[Row]]

    def __iter__(self) -> Iterator[Row]:
        return self.make()


def require_path(filepath: str | None, what: str) -> Path:
    """Raises: MissingArtifactError, saying what to give, when no path was given."""
    if not filepath:
        raise MissingArtifactError(
            f"`captioned_images` has no file. Expected {what}. Give yours: "
            f"{repeated({'captions_file': 'path/to/captions.csv'})}"
        )
    return expand_home(filepath)


def expand_home(filepath: str) -> Path:
    """A path whose `~` is the user's folder: a shell leaves the one of `captions_file=~/…` as it is."""
    _, home, behind = filepath.rpartition("/~/")  # Kedro puts the project's folder before a relative path
    return Path(f"~/{behind}" if home else filepath).expanduser()
