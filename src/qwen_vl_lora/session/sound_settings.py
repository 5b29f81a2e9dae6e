"""Checks, before the first node, that the parameters of a run make sense for what it does.

The defaults of conf/base are for the tiny base: a model of two million parameters on 112×112 pictures. They would
ruin a full-size base, so training one with them is refused. The size comes from the base's config.json: any base of
up to `TINY_PARAMETERS` may be trained with the defaults.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from kedro.framework.context import KedroContext
from kedro.io import CatalogProtocol, DatasetError
from kedro.pipeline import Pipeline

from qwen_vl_lora.exceptions import ParameterError, QwenVLLoraError
from qwen_vl_lora.hub.repositories import parse_repository
from qwen_vl_lora.model.families import Family, family_of_published
from qwen_vl_lora.model.lora_checks import missed_linear_attention
from qwen_vl_lora.model.shipped_base import DRAWINGS, FINGERPRINT
from qwen_vl_lora.pages.language import ENGLISH
from qwen_vl_lora.parameters import Parameters
from qwen_vl_lora.runs.given_command import repeated
from qwen_vl_lora.session.packaged import own_configuration

logger = logging.getLogger(__name__)

TINY_PARAMETERS = 50_000_000
"""The shipped base has 2 million; the smallest published Qwen2-VL has 2 billion, 665 million of them in its tower."""

RECIPE = "own_captions_qwen"


class _TinySetting(NamedTuple):
    """A parameter of conf/base that does not suit a full-size base.

    Attributes:
        keys: giving any one of these counts as the user's choice.
        value: reads the value from the typed parameters.
        tiny: the value in conf/base.
    """

    name: str
    keys: tuple[str, ...]
    value: Callable[[Parameters], Any]
    tiny: Any


TINY_SETTINGS = (
    _TinySetting(
        "training_args.learning_rate",
        ("training_args.learning_rate",),
        lambda parameters: parameters.training_args.learning_rate,
        4e-3,
    ),
    _TinySetting(
        "training_args.num_train_epochs",
        ("training_args.num_train_epochs", "training_args.max_steps"),
        lambda parameters: parameters.training_args.num_train_epochs,
        8,
    ),
    _TinySetting(
        "training_args.bf16 and fp16 false: computes in",
        ("training_args.bf16", "training_args.fp16"),
        lambda parameters: parameters.training_args.dtype,
        "float32",
    ),
    _TinySetting(
        "image.resized_height, resized_width",
        ("image.resized_height", "image.resized_width", "image.min_pixels", "image.max_pixels"),
        lambda parameters: (parameters.image.resized_height, parameters.image.resized_width),
        (112, 112),
    ),
    _TinySetting("max_length", ("max_length",), lambda parameters: parameters.max_length, 256),
    _TinySetting(
        "generation.max_new_tokens",
        ("generation.max_new_tokens",),
        lambda parameters: parameters.generation.max_new_tokens,
        96,
    ),
)


def stated_keys(context: KedroContext) -> frozenset[str] | None:
    """Return the keys that --params or the environment's own parameters files give, as `group.key`.

    None for a configuration that is not the project's, because that of a recorded run states every key.
    """
    loader: Any = context.config_loader
    source = Path(loader.conf_source)
    if source.resolve() != own_configuration(source, context.project_path).resolve():
        return None
    trees = [dict(loader.runtime_params or {})]
    environment = loader.env or loader.default_run_env
    if environment and environment != loader.base_env:
        files = sorted((source / environment).rglob("parameters*.y*ml"))
        trees += [yaml.safe_load(file.read_text(encoding="utf-8")) or {} for file in files]
    return frozenset(key for tree in trees for key in _keys(tree))


def check_settings(
    pipeline: Pipeline, catalog: CatalogProtocol, parameters: Parameters, stated: frozenset[str] | None
) -> None:
    """Refuse what cannot give a result: evaluation or inference without pictures, tiny defaults on a full-size base.

    Uses no network and loads no weights.

    Args:
        stated: result of `stated_keys`.

    Raises:
        ParameterError: naming the parameters, and a command that works.
        MissingArtifactError: if the pictures of inference do not exist.
    """
    outputs = pipeline.all_outputs()
    if "predictions" in outputs and parameters.split.test_images == 0:
        raise ParameterError(
            "split.test_images is 0, so no pictures are held out and there is nothing to evaluate. Run without "
            "evaluation (with the same --env and --params): kedro run --pipelines data_engineering,training. "
            'Or hold out pictures: --params "split.test_images=10%".'
        )
    if "captions" in outputs:
        from qwen_vl_lora.samples.named_pictures import named_place  # imports Pillow, which listing pipelines need not

        named_place(parameters.inference.images)
    if "adapter" in outputs:
        dataset: Any = catalog["base_model"]
        (family, size), source = _family_and_size(dataset), catalog.get("captioned_images")
        refuse_tiny_settings(str(dataset._describe()["model"]), size, parameters, stated)
        is_drawn = source is None or type(source).__name__ == DRAWINGS
        if 0 < size <= TINY_PARAMETERS and not is_drawn and dataset.load().fingerprint == FINGERPRINT:
            logger.warning(ENGLISH("drawings_only"))
        if family is not None and (missed := missed_linear_attention(family, parameters.lora)):
            logger.warning(missed)


def refuse_tiny_settings(base: str, size: float, parameters: Parameters, stated: frozenset[str] | None) -> None:
    """Refuse defaults of the tiny base that the user did not choose for this base.

    Args:
        base: path or hub id of the base.
        size: number of its parameters; infinite for an unknown model of the hub, which is not tiny.

    Raises:
        ParameterError: naming all of them, and the recipe for a full-size base.
    """
    if stated is None or size <= TINY_PARAMETERS:
        return
    left = [
        f"  {setting.name}: {_shown(setting.value(parameters))}"
        for setting in TINY_SETTINGS
        if setting.value(parameters) == setting.tiny and stated.isdisjoint(setting.keys)
    ]
    if not left:
        return
    about = "a model of the hub" if math.isinf(size) else f"{size / 1e9:.1f} billion parameters"
    more = {"captions_file": parameters.captions_file or "path/to/captions.csv", "base_model": base}
    raise ParameterError(
        f"The base model is {base} ({about}), but these settings are the defaults for the tiny base:\n"
        + "\n".join(left)
        + "\nUse the recipe with settings for a full-size base:\n"
        f"  {repeated(more, env=RECIPE)}\n"
        "or give each of these settings yourself, by --params or in conf/<env>/parameters.yml. docs/parameters.md "
        "lists what the recipe sets, and why."
    )


def _family_and_size(dataset: Any) -> tuple[Family | None, float]:
    """Return the base's family and its number of parameters, from its config.json or from the published sizes.

    0 parameters if the base is missing or unusable; other checks report that.
    """
    if dataset.exists():
        try:
            base = dataset.load()
            return base.family, float(base.geometry.parameters)
        except (QwenVLLoraError, DatasetError, ArithmeticError, AttributeError, TypeError, ValueError):
            return None, 0
    repository = parse_repository("model", str(dataset._describe()["model"]))
    if repository is None:
        return None, 0
    family = family_of_published(repository.id)
    return family, family.published_geometry(repository.id).parameters if family else math.inf


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return "×".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _keys(tree: Mapping[str, Any], above: str = "") -> Iterator[str]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _keys(value, f"{above}{key}.")
        else:
            yield f"{above}{key}"
