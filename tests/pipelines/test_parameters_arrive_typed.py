"""Kedro hands nodes validated models, not dictionaries; a hint under TYPE_CHECKING would silently end that."""

import inspect
from typing import get_type_hints

from kedro.framework.project import pipelines
from kedro.framework.session import KedroSession
from pydantic import BaseModel

from qwen_vl_lora.parameters import Parameters


def test_every_group_of_parameters_arrives_as_its_model(project):
    with KedroSession.create(project_path=project) as session:
        catalog = session.load_context().catalog
        groups = {
            name: field.annotation
            for name, field in Parameters.model_fields.items()
            if inspect.isclass(field.annotation) and issubclass(field.annotation, BaseModel)
        }
        used = {name for pipeline in dict(pipelines).values() for name in pipeline.inputs()}
        arrived = {name: type(catalog[f"params:{name}"].load()) for name in groups if f"params:{name}" in used}
        settings = catalog["params:settings"].load()
    assert arrived == {name: groups[name] for name in ("prompt", "split")}
    assert type(settings) is Parameters
    assert "params:settings" in used


def test_every_nodes_hints_can_be_resolved(project):
    with KedroSession.create(project_path=project) as session:
        session.load_context()
        for pipeline in dict(pipelines).values():
            for node in pipeline.nodes:
                assert "return" in get_type_hints(node.func), node.name
