"""Schema of `record.json`. A record may come from elsewhere, so anything that becomes part of a path must be a name."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from qwen_vl_lora.names import is_name

FORMAT = 1

Outcome = Literal["running", "finished", "failed", "interrupted"]


def _require_name(value: str) -> str:
    if not is_name(value):
        raise ValueError("expected a name: letters, digits and _ . + -")
    return value


def _require_path(value: str) -> str:
    if "\0" in value:
        raise ValueError("expected a path without NUL")
    return value


Name = Annotated[str, AfterValidator(_require_name)]
StoredPath = Annotated[str, Field(max_length=4096), AfterValidator(_require_path)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Number = Annotated[int, Field(ge=0, le=2**53)]


class _Facts(BaseModel):
    """Base class. Unknown keys are kept, because a later version may write more."""

    model_config = ConfigDict(extra="allow", strict=True, defer_build=True)


class ArtifactFacts(_Facts):
    """One dataset that a run read or wrote."""

    version: str | None = None
    path: StoredPath | None = None
    sha256: str | None = None
    content_sha256: str | None = None
    files: dict[StoredPath, str] = {}
    keys: list[Name] = []
    describe: dict[str, Any] = {}


class WrittenFacts(ArtifactFacts):
    """A dataset that a run wrote; its version is the name of a folder."""

    version: Name | None = None


class Datasets(_Facts):
    """Datasets that were read and written, by name."""

    read: dict[str, ArtifactFacts]
    written: dict[str, WrittenFacts]


class CaptionsFacts(_Facts):
    """Captions of one side of an evaluation: where they are kept, and how many of them were there before."""

    key: Name
    taken: Number = 0


class WorkFacts(_Facts):
    """What a node did: how much of a unit, how fast, and how much of it each process."""

    unit: str
    count: Number
    seconds: Amount
    per_second: Amount
    processes: dict[str, Number]


class RecordFacts(_Facts):
    """The content of `record.json`."""

    format: Literal[1]
    id: Name
    recipe: Name
    outcome: Outcome
    datasets: Datasets
    order: Number = 0
    sequence: Number = 0
    pipelines: list[Name] = []
    env: Name | None = None
    configuration: StoredPath | None = None
    command: str | None = None
    message: str | None = None
    started: str | None = None
    ended: str | None = None
    device: str | None = None
    threads: Number | None = None
    runtime_params: dict[str, Any] = {}
    parameters: dict[str, Any] = {}
    stages: dict[str, list[str]] = {}
    free_inputs: dict[str, Name] = {}
    made_from: list[dict[str, Any]] = []
    results: dict[str, dict[str, Any]] = {}
    captions: dict[str, CaptionsFacts] = {}
    node_seconds: dict[str, Amount] = {}
    work: dict[str, WorkFacts] = {}
    packages: dict[str, str] = {}
    git: dict[str, Any] | None = None


def fault_of_record(facts: Any) -> str | None:
    """Return the first deviation from the schema in one line, or None."""
    try:
        RecordFacts.model_validate(facts)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in fault["loc"])
        got = repr(fault["input"])
        shown = got if len(got) <= 80 and got.isprintable() else f"a {type(fault['input']).__name__}"
        return f"{where or 'its content'}: {fault['msg']}; got {shown}"
    return None
