"""The block `inference`: which pictures are captioned, by what, and in which forms the captions are written."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import ClassVar, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator, model_validator

from qwen_vl_lora.parameter_groups import ParameterGroup

ServerKind = Literal["transformers", "vllm", "sglang", "llama.cpp", "openai"]

KEY = "QWEN_VL_LORA_API_KEY"
"""The environment variable with the key of `inference.server`. There is no parameter for it."""


class ChatServerParameters(ParameterGroup):
    """A server with OpenAI's protocol that is asked about pictures."""

    block: ClassVar[str]
    """The keys' own block, for messages."""

    address: str | list[str] | None = Field(
        default=None, description="http://127.0.0.1:8000/v1, or a list of equal servers; null: none"
    )
    model: str | None = Field(default=None, min_length=1, description="its name there; null: the only one")
    kind: Literal["auto", "transformers", "vllm", "sglang", "llama.cpp", "openai"] = Field(
        default="auto", description="what may be sent beside the protocol"
    )
    requests: PositiveInt = Field(default=8, le=1024, description="pictures asked about at once, at each address")
    timeout: PositiveFloat = Field(default=120.0, description="seconds for one answer, from connecting to its end")
    retries: NonNegativeInt = Field(default=6, le=20, description="of one picture, with growing pauses")
    allow_http: bool = Field(default=False, description="plain http to other machines")

    @property
    def addresses(self) -> tuple[str, ...]:
        """Each server, without a slash at the end; empty without one."""
        given = [self.address] if isinstance(self.address, str) else self.address or []
        return tuple(dict.fromkeys(address.rstrip("/") for address in given))

    @model_validator(mode="after")
    def _addresses_are_safe(self) -> Self:
        if self.address == []:
            raise ValueError("address: expected at least one address, or null; got []")
        for address in self.addresses:
            _check_address(address, self)
        return self


class ServerParameters(ChatServerParameters):
    """A server that captions in place of a model in this process."""

    block: ClassVar[str] = "inference.server"

    image_tokens: Literal["check", "ignore"] = Field(
        default="check", description="check refuses a server whose prompts have another length than in training"
    )
    pictures: Literal["data", "file"] = Field(
        default="data", description="data: inside the request. file: by file:// path, for a server that reads this disk"
    )

    @model_validator(mode="after")
    def _disk_is_shared(self) -> Self:
        for address in self.addresses if self.pictures == "file" else ():
            if not is_loopback(urlsplit(address).hostname or ""):
                raise ValueError(
                    f"pictures: `file` is for a server on this machine, which reads its disk; got {address}. Set "
                    f"{self.block}.pictures: data"
                )
        return self


def _check_address(address: str, server: ChatServerParameters) -> None:
    """Raises: ValueError if it is not an http or https address, contains a key, or goes to others unencrypted."""
    form = f"expected an address such as http://127.0.0.1:8000/v1; got {address!r}"
    try:
        parts = urlsplit(address)
        port = parts.port
    except ValueError as error:
        raise ValueError(form) from error
    if "@" in parts.netloc or parts.query or parts.fragment:
        place = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
        raise ValueError(f"{place}: an address may not contain a user, a query or a fragment; give a key by {KEY}")
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0 or not address.isprintable():
        raise ValueError(form)
    if parts.scheme == "http" and not is_loopback(parts.hostname) and not server.allow_http:
        raise ValueError(
            f"{address} would send pictures unencrypted to another machine; give https, a tunnel to 127.0.0.1, or set "
            f"{server.block}.allow_http: true"
        )


def is_loopback(host: str) -> bool:
    """Whether a host of an address is this machine itself."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class SamplingParameters(ParameterGroup):
    """How inference draws words. Evaluation always takes the likeliest word."""

    temperature: float = Field(default=0.0, ge=0, le=5, description="0 takes the likeliest word: the same each time")
    top_p: float = Field(default=1.0, gt=0, le=1, description="only the likeliest words that share this probability")
    seed: NonNegativeInt = Field(default=0, lt=2**31, description="of the draws; unused with temperature 0")


class OutputParameters(ParameterGroup):
    """Forms of the captions beside captions.csv."""

    sidecars: str | None = Field(
        default=None,
        min_length=1,
        description="beside: photo.txt beside photo.jpg; or a folder with the same subfolders",
    )
    jsonl: str | None = Field(default=None, min_length=1, description="file with image_path and caption on each line")
    parquet: str | None = Field(default=None, min_length=1, description="file with the columns image_path and caption")
    prefix: str = Field(default="", description="before each caption in these forms, such as a trigger word")
    suffix: str = Field(default="", description="after each caption in these forms")
    overwrite: bool = Field(default=False, description="replace sidecars and files that exist")

    @field_validator("prefix", "suffix")
    @classmethod
    def _is_one_line(cls, text: str) -> str:
        if not (text.isprintable() or not text):
            raise ValueError(f"expected one line without control characters; got {text!r}")
        return text

    @model_validator(mode="after")
    def _files_have_their_endings(self) -> Self:
        for name, endings in (("jsonl", (".jsonl",)), ("parquet", (".parquet",))):
            given = getattr(self, name)
            if given is not None and Path(given).suffix.lower() not in endings:
                raise ValueError(f"{name}: expected a file that ends with {endings[0]}; got {given!r}")
        return self


class InferenceParameters(ParameterGroup):
    """The pictures that the inference pipeline captions, and whose prompt and picture size it uses."""

    images: str | None = Field(description="a folder, a picture, or a CSV with image_path; relative to the project")
    recursive: bool = Field(description="include subfolders")
    settings_from: Literal["parameters", "adapter"] = Field(description="as scoring.settings_from")
    # Stored runs older than these keys lack them. With these defaults, those of parameters.yml, they can be replayed.
    adapter: Literal["trained", "none"] = Field(default="trained", description="none: captions of the base alone")
    server: ServerParameters = Field(default_factory=ServerParameters, description="captions by a server")
    sampling: SamplingParameters = Field(default_factory=SamplingParameters, description="how words are drawn")
    output: OutputParameters = Field(default_factory=OutputParameters, description="forms beside captions.csv")
