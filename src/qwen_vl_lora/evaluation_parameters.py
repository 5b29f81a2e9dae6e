"""The block `evaluation`: what else captions the held-out pictures, and how captions are judged beside the metrics."""

from __future__ import annotations

from typing import ClassVar, Self

from pydantic import Field, field_validator, model_validator

from qwen_vl_lora.inference_parameters import ChatServerParameters, ServerParameters
from qwen_vl_lora.parameter_groups import ParameterGroup

RESERVED = ("base", "tuned", "reference", "tie")
"""Names of the sides that every evaluation has, and a judge's word for none."""


class ContenderServer(ServerParameters):
    """The keys of `inference.server`, for one contender."""

    block: ClassVar[str] = "evaluation.contenders: server"


class Contender(ParameterGroup):
    """An adapter, a merged model or a server that captions the held-out pictures beside base and tuned."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", max_length=40, description="of its columns in predictions")
    adapter: str | None = Field(default=None, min_length=1, description="a version of the recipe's adapter, or a path")
    model: str | None = Field(default=None, min_length=1, description="directory of a merged model")
    server: ContenderServer | None = Field(default=None, description="the keys of inference.server")

    @property
    def place(self) -> str:
        """What it is, for readers."""
        if self.server is not None:
            return f"server {', '.join(self.server.addresses)}"
        return f"adapter {self.adapter}" if self.adapter is not None else f"model {self.model}"

    @field_validator("name")
    @classmethod
    def _name_is_free(cls, name: str) -> str:
        if name in RESERVED:
            raise ValueError(f"expected another name than {', '.join(RESERVED)}; got {name!r}")
        return name

    @model_validator(mode="after")
    def _is_one_thing(self) -> Self:
        given = [key for key in ("adapter", "model", "server") if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(
                f"{self.name}: expected one of adapter, model and server; got {' and '.join(given) or 'none of them'}"
            )
        if self.server is not None and not self.server.addresses:
            raise ValueError(f"{self.name}: server needs an address, such as http://127.0.0.1:8000/v1; got null")
        return self


class JudgeParameters(ChatServerParameters):
    """A vision model behind a server that prefers one of two captions."""

    block: ClassVar[str] = "evaluation.judge"


class EvaluationParameters(ParameterGroup):
    """What an evaluation does beside scoring base and tuned."""

    # Stored runs older than this block lack it. With these defaults, those of parameters.yml, they can be replayed.
    contenders: list[Contender] = Field(default=[], description="adapters, models, servers beside base and tuned")
    judge: JudgeParameters = Field(
        default_factory=JudgeParameters, description="prefers one of two captions, asked blind"
    )
    clip_score: str | None = Field(default=None, min_length=1, description="path or hub id of a CLIP model; null: none")

    @field_validator("contenders")
    @classmethod
    def _names_differ(cls, contenders: list[Contender]) -> list[Contender]:
        names = [contender.name for contender in contenders]
        if doubled := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"expected a name of its own for each contender; got {', '.join(doubled)} more than once")
        return contenders
