"""Checks before the first node that a run can succeed. They are cheap and write nothing."""

from __future__ import annotations

import contextlib
import gc
import logging
import stat
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from kedro.io import CatalogProtocol
from kedro.pipeline import Pipeline

from qwen_vl_lora.exceptions import DataFormatError, MissingArtifactError
from qwen_vl_lora.hub.repositories import parse_repository
from qwen_vl_lora.model.base_model import check_packages, difference_of
from qwen_vl_lora.model.devices import choose_device, memory_of, wait_as_suits_the_cores
from qwen_vl_lora.model.families import FAMILIES, Family, family_of_published
from qwen_vl_lora.model.parent import find_parent
from qwen_vl_lora.model.pictures import PictureSizer
from qwen_vl_lora.parameters import CaptionsParameters, ImageParameters, Parameters, QuarantineParameters
from qwen_vl_lora.samples.conversations import Conversations
from qwen_vl_lora.samples.digests import Digests
from qwen_vl_lora.samples.records import Rejection, Row
from qwen_vl_lora.samples.source import GivenRows, Reading, Source, as_source

logger = logging.getLogger(__name__)

MAX_QUIET_COPIES = 10 * 10**9
"""Bytes of pictures that are stored without a word."""

SOURCE, BASE = "captioned_images", "base_model"


def check_run(pipeline: Pipeline, catalog: CatalogProtocol, settings: Parameters) -> None:
    """Refuse a run whose settings, device or inputs cannot be used.

    Checks without torch come first, those of the network last.

    Raises:
        QwenVLLoraError: naming what is missing and what to do.
    """
    inputs = pipeline.inputs()
    computes = bool(pipeline.only_nodes_with_tags("compute").nodes)
    trains = "adapter" in pipeline.all_outputs()
    if computes and not _only_asks_servers(pipeline, settings):
        wait_as_suits_the_cores()
        _check_computing(settings)
    datasets: dict[str, Any] = {
        name: catalog.get(name) for name in sorted(inputs) if not name.startswith("params:") and name != "parameters"
    }
    remote = [
        name for name, dataset in datasets.items() if hasattr(dataset, "needs_network") and dataset.needs_network()
    ]
    for name, dataset in datasets.items():
        if name != BASE and name not in remote:
            _check_input(name, dataset)
    if SOURCE in inputs:
        _check_source(catalog, settings)
    if trains:
        _check_training(settings)
    if BASE in datasets and BASE not in remote:
        _check_input(BASE, datasets[BASE])
    if computes or SOURCE in inputs:
        _check_sizes(catalog, inputs, settings.image, trains=trains)
    if trains:
        if settings.init_adapter is not None:
            find_parent(settings.init_adapter, catalog["workspace"].places())
        if BASE in inputs:
            _check_adapter(catalog, settings)
            _check_rows(catalog, inputs, settings)
        _check_memory(catalog, inputs, settings)
    if "predictions" in pipeline.all_outputs() and settings.evaluation.contenders:
        _check_contenders(catalog, settings)
    if "caption_metrics" in pipeline.all_outputs() and settings.evaluation.clip_score is not None:
        _check_clip(catalog, settings.evaluation.clip_score)
    if (computes or SOURCE in inputs) and settings.cluster.address is not None:
        _check_cluster(catalog, settings, inputs)
    for name in remote:
        _check_input(name, datasets[name])


def _only_asks_servers(pipeline: Pipeline, settings: Parameters) -> bool:
    """Whether nothing is computed on this machine, so that its device does not matter."""
    outputs = pipeline.only_nodes_with_tags("compute").all_outputs()
    return bool(settings.inference.server.addresses) and outputs == {"captions", "caption_sheet"}


def _check_computing(settings: Parameters) -> None:
    if settings.device == "cuda":
        choose_device("cuda")
    check_packages(settings)


def _check_training(settings: Parameters) -> None:
    """Checks that need transformers and torch. A run that only prepares data does not import them."""
    with _without_collections():
        from qwen_vl_lora.cluster.work import Processes
        from qwen_vl_lora.training.arguments import check_arguments
        from qwen_vl_lora.training.fit import usable_settings
        from qwen_vl_lora.training.row_mask import check_packing

    device = choose_device(settings.device)
    check_packing(settings.attention, device, None)
    check_arguments(usable_settings(settings, device, Processes(settings.cluster, device).count))


@contextlib.contextmanager
def _without_collections() -> Iterator[None]:
    """Context for imports of torch and transformers: all that they make stays, and looking through it takes a fifth."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _check_sizes(catalog: CatalogProtocol, inputs: set[str], image: ImageParameters, *, trains: bool) -> None:
    """Check the pixel limits: an image token fits, and no training picture is resized to nothing."""
    known = _family(catalog[BASE]) if BASE in inputs else None
    # Without the base its family is unknown: at least the smallest token of any family must fit.
    family = known or min(FAMILIES, key=lambda family: family.token_side)
    sizer = PictureSizer(image, family.patch_size, family.merge_size)
    if known and (rounding := sizer.rounding()):
        logger.info(rounding)
    if trains and image.max_pixels is not None and "images" in inputs:
        for entry in catalog["images"].load():
            sizer.grid(entry.width, entry.height)


def _family(base_model: Any) -> Family | None:
    """The family of the local base, else of the published checkpoint with its name, else None."""
    if base_model.exists():
        family: Family = base_model.load().family
        return family
    repository = parse_repository("model", str(base_model._describe()["model"]))
    return family_of_published(repository.id) if repository else None


def _check_memory(catalog: CatalogProtocol, inputs: set[str], settings: Parameters) -> None:
    """Check with the estimate of `qwen-vl-lora plan` that the training fits into the GPU's memory."""
    gpu_memory = memory_of(choose_device(settings.device))
    if gpu_memory is None:
        return
    from qwen_vl_lora.session.planning import find_base
    from qwen_vl_lora.training.plan import PlannedData, check_memory, longest

    try:
        base = find_base(catalog)
    except MissingArtifactError:  # not local, and of unknown size: the check of the base itself reports more
        return
    data = None
    if {"train_conversations", "images"} <= inputs:
        train, images = catalog["train_conversations"].load(), catalog["images"].load()
        longest_ones = Conversations(longest(train, settings))
        data = PlannedData(longest_ones, [], [], images, "train_conversations", rejected=0)
    check_memory(base, data, settings, gpu_memory)


def _check_adapter(catalog: CatalogProtocol, settings: Parameters) -> None:
    """Check the settings of LoRA against the base's own modules, if the base is local."""
    if not catalog[BASE].exists():
        return
    from qwen_vl_lora.model.lora import check_lora

    check_lora(catalog[BASE].load(), settings.lora, settings.vision, quantized=settings.is_quantized)


def _check_contenders(catalog: CatalogProtocol, settings: Parameters) -> None:
    """Check that contenders are there, and that adapters fit the base if it is local."""
    from qwen_vl_lora.evaluation.contenders import find_contenders, find_places

    base, workspace = catalog[BASE], catalog["workspace"].places()
    if base.exists():
        find_contenders(settings.evaluation.contenders, base.load(), workspace, settings)
    else:
        find_places(settings.evaluation.contenders, workspace)


def _check_clip(catalog: CatalogProtocol, named: str) -> None:
    """Check that the CLIP of CLIPScore is there, or can be downloaded."""
    from qwen_vl_lora.evaluation.clip_score import find_clip

    place = find_clip(named, catalog["workspace"].places().project)
    if not isinstance(place, Path):
        place.check()


def _check_cluster(catalog: CatalogProtocol, settings: Parameters, inputs: set[str]) -> None:
    """Check that every machine of the cluster sees project, base and source, and has the same packages."""
    from qwen_vl_lora.cluster import ray_cluster

    entry = catalog[BASE]
    base = entry.load() if entry.exists() else None
    source = as_source(catalog[SOURCE].load()) if SOURCE in inputs else None
    folders = () if source is None or source.fetcher(settings.image) else source.folders
    looks: list[Callable[[], str]] = [partial(_unseen, folder.absolute()) for folder in folders]
    if base is not None and not base.path.resolve().is_relative_to(Path.cwd()):
        looks.append(partial(difference_of, base.path, base.files))
    ray_cluster.check(settings.cluster, catalog["workspace"].load().path, partial(_first_fault, looks))


def _unseen(folder: Path) -> str:
    """What a machine says that does not see a folder of the source."""
    return "" if folder.is_dir() else f"does not see {folder}, the folder of {SOURCE}. All machines must see it there"


def _first_fault(looks: list[Callable[[], str]]) -> str:
    return next(filter(None, (look() for look in looks)), "")


def _check_rows(catalog: CatalogProtocol, inputs: set[str], settings: Parameters) -> None:
    """Check that no two rows would stand in one line, and no two answers in one row, in a family that mixes them."""
    from qwen_vl_lora.training.row_mask import check_packing

    family = _family(catalog[BASE])
    check_packing(settings.attention, choose_device(settings.device), family)
    if family is None or family.shares_rows or settings.rows == "separate" or "train_conversations" not in inputs:
        return
    from qwen_vl_lora.training.rows import shared_rows_error

    prompts = Digests()
    for record in catalog["train_conversations"].load():
        prompts.add(str(_prompt(record["conversations"])))
    if prompts.num_different < len(prompts):
        raise shared_rows_error(family)


def _prompt(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The turns before the first answer that is trained."""
    trained = (turn["from"] == "assistant" and turn.get("loss", True) for turn in turns)
    return turns[: next((place for place, is_trained in enumerate(trained) if is_trained), len(turns))]


def _check_input(name: str, dataset: Any) -> None:
    look = getattr(dataset, "check", None) or getattr(dataset, "existing_path", None)
    if look is None:
        return
    try:
        look()
    except MissingArtifactError as error:
        raise MissingArtifactError(f"Dataset {name}: {error}") from error


def _check_source(catalog: CatalogProtocol, settings: Parameters) -> None:
    reading = Reading.of(settings.captions, settings.image)
    rows = as_source(catalog[SOURCE].load()).read_as(reading)
    places = catalog["workspace"].places()
    num_bytes = check_files(rows, settings.captions, settings.quarantine, places.project)
    if settings.image.storage == "copy":
        report_copies(num_bytes, places.images)


def report_copies(num_bytes: int, folder: Path) -> None:
    """Warn if more than MAX_QUIET_COPIES bytes of pictures will be stored."""
    if num_bytes > MAX_QUIET_COPIES:
        logger.warning(
            "The pictures of %s have %.1f GB, and image.storage: copy stores them once more in %s. "
            "image.storage=reference leaves them where they are; they must then stay there unchanged.",
            SOURCE,
            num_bytes / 1e9,
            folder,
        )


def check_files(
    rows: Source, captions: CaptionsParameters, quarantine: QuarantineParameters, project: Path = Path()
) -> int:
    """Refuse a source without rows, or with more bad rows than `quarantine.max_share` allows.

    Checks only that files exist; their contents are checked when they are collected. Returns the bytes of all files of
    pictures, each counted once; 0 for a source that cannot be read quickly.

    Raises:
        DataFormatError: with the number of bad rows and the first of them.
    """
    if not rows.is_quick or isinstance(rows, GivenRows):
        return 0
    from qwen_vl_lora.samples.collection import take_rows  # imports pandas, which listing pipelines does not need

    num_rows, faults, files = 0, [], _Files()
    for row in take_rows(rows, captions, project):
        num_rows += 1
        fault = _fault(row, files)
        if fault is not None:
            faults.append(fault)
    if num_rows == 0:
        raise DataFormatError(
            f"The source `{SOURCE}` ({rows}) has no rows. Give a file with at least one caption, and check "
            "captions.num_rows."
        )
    if len(faults) > quarantine.max_share * num_rows:
        shown = "\n".join(f"  {fault}" for fault in faults[:5])
        raise DataFormatError(
            f"{len(faults)} of {num_rows} rows of `{SOURCE}` ({rows}) cannot be used; quarantine.max_share allows "
            f"{quarantine.max_share:.0%}. The first:\n{shown}\nCorrect the file or its image paths (they are relative "
            "to the file), or raise quarantine.max_share."
        )
    return files.num_bytes


class _Files:
    """Files that were looked at, by the hashes of their paths: a source may name millions."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self._counted: set[int] = set()

    def has(self, file: Path) -> bool:
        """Whether there is such a file."""
        try:
            facts = file.stat()
        except (OSError, ValueError):  # a name that is too long, or holds a NUL: the row is bad, not the run
            return False
        if not stat.S_ISREG(facts.st_mode):
            return False
        if (path := hash(file)) not in self._counted:
            self._counted.add(path)
            self.num_bytes += facts.st_size
        return True


def _fault(row: Row, files: _Files) -> str | None:
    if isinstance(row, Rejection):
        if row.reason == "excluded":
            return None
        return f"row {row.row}: {row.reason}: {row.detail}"
    lost = [image for image in row.images if isinstance(image, Path) and not files.has(image)]
    return f"row {row.row}: missing_image: {lost[0]} not found" if lost else None
