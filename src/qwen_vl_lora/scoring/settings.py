"""How pictures are asked about: as configured, or as an adapter was trained to be."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Self

from pydantic import ValidationError

from qwen_vl_lora.exceptions import ParameterError
from qwen_vl_lora.modeling.adapter import Adapter
from qwen_vl_lora.parameters import (
    GenerationParameters,
    ImageParameters,
    Parameters,
    PromptParameters,
    TrainingParameters,
)


@dataclass(frozen=True)
class CaptionSettings:
    """The blocks of parameters.yml that captioning reads, and where the model runs."""

    prompt: PromptParameters
    image: ImageParameters
    generation: GenerationParameters
    vision: Literal["frozen", "adapted"]
    dtype: str
    device: str
    quantization: str | None

    @classmethod
    def of_parameters(cls, parameters: Parameters) -> Self:
        """The configured settings."""
        return cls(
            prompt=parameters.prompt,
            image=parameters.image,
            generation=parameters.generation,
            vision=parameters.vision,
            dtype=parameters.training_args.dtype,
            device=parameters.device,
            quantization=parameters.quantization,
        )

    def for_adapter(self, adapter: Adapter, settings_from: Literal["parameters", "adapter"]) -> Self:
        """These settings, or the adapter's own.

        Args:
            settings_from: whether `parameters` decide, and must then be those of the training, or the adapter's record.

        Raises:
            AdapterError: if they decide and the adapter was trained with others.
        """
        if settings_from == "adapter":
            return self.as_trained(adapter)
        adapter.check_settings(self.prompt, self.image, self.vision, self.quantization)
        return self

    def as_trained(self, adapter: Adapter) -> Self:
        """The adapter's own settings; what its training did not fix stays: limits on files, batch size, device."""
        record = adapter.record
        generation = {**record["generation"], "batch_size": self.generation.batch_size}
        return replace(
            self,
            prompt=PromptParameters.model_validate(record["prompt"]),
            image=ImageParameters.model_validate({**self.image.model_dump(), **adapter.picture_size}),
            generation=GenerationParameters.model_validate(generation),
            vision=record["vision"],
            dtype=TrainingParameters.model_validate(record["training_args"]).dtype,
            quantization=adapter.quantization,
        )

    def asking(self, user: str) -> Self:
        """The same with another question.

        Raises:
            ParameterError: if it is no question, such as an empty text.
        """
        try:
            prompt = PromptParameters.model_validate({**self.prompt.model_dump(), "user": user})
        except ValidationError as error:
            raise ParameterError(
                f"The prompt {user!r} cannot be asked: {error.errors()[0]['msg']}. Give a text or leave the option out."
            ) from error
        return replace(self, prompt=prompt)
