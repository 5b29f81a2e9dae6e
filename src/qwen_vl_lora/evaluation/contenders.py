"""Who captions the held-out questions: base, tuned model, and the contenders that `evaluation.contenders` names."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen_vl_lora.evaluation_parameters import Contender
from qwen_vl_lora.exceptions import AdapterError, MissingArtifactError
from qwen_vl_lora.inference_parameters import ServerParameters
from qwen_vl_lora.model.adapter import Adapter
from qwen_vl_lora.model.base_model import BaseModel
from qwen_vl_lora.model.parent import find_adapter, place_of
from qwen_vl_lora.parameters import Parameters
from qwen_vl_lora.samples.workspace import Workspace

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Side:
    """Who captions the held-out questions: a base, with or without an adapter.

    Attributes:
        name: of its columns in `predictions`.
        server: writes the captions in place of a model in this process; base and adapter give the settings.
        vision: of the adapter's training, where it may be another than that of the settings.
        facts: what it is, for the run's record.
    """

    name: str
    base_model: BaseModel
    adapter: Adapter | None = None
    server: ServerParameters | None = None
    vision: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)


def find_places(contenders: Sequence[Contender], workspace: Workspace) -> dict[str, Adapter | BaseModel | None]:
    """Adapter or model of each contender, None of a server. Reads no weights and asks no server.

    Raises:
        MissingArtifactError: if an adapter or a model is not there.
        AdapterError, BaseModelError: if its files cannot be used.
    """
    return {contender.name: _find_place(contender, workspace) for contender in contenders}


def find_contenders(
    contenders: Sequence[Contender], base_model: BaseModel, workspace: Workspace, settings: Parameters
) -> list[Side]:
    """The sides that parameters name.

    Args:
        settings: of the evaluation. An adapter that was trained with others captions with these, and is reported.

    Raises:
        AdapterError: if an adapter was trained on another base; else as `find_places`.
    """
    places = find_places(contenders, workspace)
    return [_side(contender, places[contender.name], base_model, workspace, settings) for contender in contenders]


def _find_place(contender: Contender, workspace: Workspace) -> Adapter | BaseModel | None:
    key = f"evaluation.contenders: {contender.name}"
    if contender.adapter is not None:
        return find_adapter(contender.adapter, workspace, key)
    if contender.model is None:
        return None
    model = BaseModel(contender.model, workspace.project / Path(contender.model).expanduser())
    if not model.path.is_dir():
        raise MissingArtifactError(
            f"{key} names the model {contender.model!r}, but there is no such directory. Give that of a merged model, "
            "such as kedro run --pipeline export writes."
        )
    model.check()
    return model


def _side(
    contender: Contender,
    place: Adapter | BaseModel | None,
    base_model: BaseModel,
    workspace: Workspace,
    settings: Parameters,
) -> Side:
    name = contender.name
    if place is None:
        return Side(name, base_model, server=contender.server)
    if isinstance(place, BaseModel):
        facts = {"model": {"path": contender.model, "fingerprint": place.fingerprint}}
        return Side(name, place, vision="frozen", facts=facts)
    trained = place.record["base_model"]
    if trained["fingerprint"] != base_model.fingerprint:
        raise AdapterError(
            f"evaluation.contenders: {name} names {place.path}, which was trained on {trained['name']} "
            f"({trained['fingerprint']}); the base of this evaluation is {base_model.name} ({base_model.fingerprint}). "
            "Merge it into its own base (kedro run --pipeline export), and name the merged model by `model`."
        )
    place.check_base(base_model)
    if differences := place.differences(settings):
        logger.warning("%s captions as the others do, though it was trained otherwise: %s.", name, differences)
    run = (place.record.get("run") or {}).get("id")
    facts = {"adapter": {"path": place_of(place, workspace), "sha256": place.weights_sha256, "run": run}}
    return Side(name, base_model, place, vision=place.record["vision"], facts=facts)
