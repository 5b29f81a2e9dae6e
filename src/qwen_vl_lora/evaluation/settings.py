"""Settings for captioning: the configured ones, or those of the adapter's training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import ValidationError

from qwen_vl_lora.exceptions import ParameterError
from qwen_vl_lora.inference_parameters import SamplingParameters
from qwen_vl_lora.model.adapter import Adapter
from qwen_vl_lora.parameters import GenerationParameters, ImageParameters, Parameters
from qwen_vl_lora.samples.prompts import checked_prompt


def settings_for(
    adapter: Adapter, settings: Parameters, settings_from: Literal["parameters", "adapter"], *, asks: bool
) -> Parameters:
    """The configured settings, or the adapter's own.

    Args:
        settings_from: `parameters` uses `settings`, which must equal those of the training; `adapter` uses its record.
        asks: whether `prompt` is asked; otherwise conversations have their own questions.

    Raises:
        AdapterError: if `settings` are used and the adapter was trained with others.
        ParameterError: if the adapter's own question is asked and it was trained with several.
    """
    if settings_from == "adapter":
        return asking_as_trained(adapter, settings) if asks else adapter.trained_settings(settings)
    adapter.check_settings(settings, asks=asks)
    return settings


def asking_as_trained(
    adapter: Adapter, settings: Parameters, user: str | None = None, system: str | None = None
) -> Parameters:
    """`Adapter.trained_settings` with the trained question, or with another one.

    Args:
        user: question that replaces the trained one.
        system: system text that replaces the trained one; the empty text selects the chat template's own.

    Raises:
        ParameterError: if several were trained and none is given.
    """
    prompt = adapter.trained_prompt.choose(user, system)
    if prompt is None:
        raise ParameterError(adapter.trained_prompt.refusal())
    return adapter.trained_settings(settings).model_copy(update={"prompt": prompt})


def asking(settings: Parameters, user: str | None, system: str | None = None) -> Parameters:
    """`settings` with another question, another system text, or both; None keeps the current one.

    Raises:
        ParameterError: if it is not a question, such as an empty text.
    """
    prompt = checked_prompt(
        settings.prompt.user if user is None else user,
        settings.prompt.system if system is None else system or None,
        override=settings.prompt.override,
    )
    return settings.model_copy(update={"prompt": prompt})


def changed(settings: Parameters, given: Mapping[str, Any]) -> Parameters:
    """`settings` with the keys of `image`, `generation` and `inference.sampling` that `given` has; others stay.

    Raises:
        ParameterError: if a value is not valid, or does not go with the others.
    """
    try:
        image = ImageParameters.model_validate({**settings.image.model_dump(), **given.get("image", {})})
        generation = {**settings.generation.model_dump(), **given.get("generation", {})}
        drawn = {**settings.inference.sampling.model_dump(), **given.get("inference", {}).get("sampling", {})}
        inference = settings.inference.model_copy(update={"sampling": SamplingParameters.model_validate(drawn)})
        blocks = {
            "image": image,
            "generation": GenerationParameters.model_validate(generation),
            "inference": inference,
        }
    except ValidationError as error:
        faults = (
            f"{'.'.join(map(str, fault['loc']))}: {fault['msg'].removeprefix('Value error, ')}".removeprefix(": ")
            for fault in error.errors()
        )
        raise ParameterError(
            f"These settings are not valid: {'; '.join(faults)}. See docs/parameters.md for every key."
        ) from error
    return settings.model_copy(update=blocks)
