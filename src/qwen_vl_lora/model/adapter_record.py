"""The schema of `adapter_record.json`: the names and types that this project reads.

A record may come from a stranger, so everything that is read from it is validated here. Blocks whose names belong to
other libraries, or that only describe, may contain more. Unknown names at the top level are refused: a newer version
may have trained in a way that this version does not know.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
)

from qwen_vl_lora.parameters import GenerationParameters, ImageParameters

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, defer_build=True)


class _Open(BaseModel):
    """A block that may contain additional keys."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True, allow_inf_nan=False, defer_build=True)

    __pydantic_extra__: dict[str, JsonValue]


class _RecordedBase(_Closed):
    name: str
    revision: str | None = None
    fingerprint: Sha256
    files: dict[str, Sha256] = {}


class _RecordedPrompt(_Open):
    user: Annotated[str, Field(min_length=1)] | None
    system: str | None
    override: bool


class _RecordedLora(_Open):
    r: PositiveInt
    lora_alpha: PositiveInt
    lora_dropout: Annotated[float, Field(ge=0, lt=1)]
    bias: Literal["none", "all", "lora_only"]
    target_modules: list[str] | str
    use_rslora: bool
    use_dora: bool


class _RecordedArguments(_Open):
    bf16: bool
    fp16: bool


class _RecordedSplit(_Open):
    sha256: str
    samples: NonNegativeInt


class _RecordedData(_Open):
    train_conversations: _RecordedSplit
    validation_conversations: _RecordedSplit


class _RecordedLoss(_Closed):
    step: NonNegativeInt
    loss: float | None = None
    validation_loss: float | None = None


class _RecordedTraining(_Open):
    trainable_parameters: NonNegativeInt
    seconds: NonNegativeFloat | None = None
    curve: list[_RecordedLoss] = []


class _RecordedParent(_Closed):
    path: str
    sha256: Sha256
    run: str | None


class _ReadArtifact(_Open):
    version: str | None
    path: str | None = None


class _RecordedRun(_Open):
    id: str
    recipe: str | None = None
    read: dict[str, _ReadArtifact] = {}


class AdapterRecord(_Closed):
    """All of `adapter_record.json`. `run` is added when a run saves the adapter."""

    base_model: _RecordedBase
    prompt: _RecordedPrompt
    image: ImageParameters
    generation: GenerationParameters
    max_length: PositiveInt
    vision: Literal["frozen", "adapted"]
    rows: str
    attention: str = "sdpa"
    quantization: Literal["nf4", "int8"] | None = None
    lora: _RecordedLora
    training_args: _RecordedArguments
    training: _RecordedTraining
    parent: _RecordedParent | None = None
    data: _RecordedData
    run: _RecordedRun = Field(default=None)  # type: ignore[assignment]  # absent, but never null


def faults_of_record(content: dict[str, Any]) -> list[str]:
    """The faults of a record, one text each; empty for a valid record."""
    try:
        AdapterRecord.model_validate(content)
    except ValidationError as error:
        return [
            f"{'.'.join(map(str, fault['loc']))}: {_in_words(fault['type'], fault['msg'])}" for fault in error.errors()
        ]
    return []


def _in_words(kind: str, message: str) -> str:
    return "unknown; written by a newer version, or by hand" if kind == "extra_forbidden" else message
