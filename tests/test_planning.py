"""A plan is made of what the run itself would take."""

from __future__ import annotations

import pytest
from kedro.framework.session import KedroSession
from kedro.framework.startup import bootstrap_project

from command_line import make_project
from qwen_vl_lora.exceptions import DataFormatError
from qwen_vl_lora.parameters import validate_parameters
from qwen_vl_lora.session.planning import find_data
from samples.pictures import write


def data_of(project, **given):
    """What would be trained on, by the recipe for anybody's captions."""
    bootstrap_project(project)
    with KedroSession.create(project_path=project, env="own_captions", runtime_params=given) as session:
        context = session.load_context()
        return find_data(context, validate_parameters(dict(context.params)), from_source=False)


def test_pictures_by_address_count_where_they_may_be_fetched(tmp_path):
    project = make_project(tmp_path / "project")
    lines = [f"https://pictures.example/{number}.jpg,A dog." for number in range(12)]
    file = write(tmp_path / "c.csv", "\n".join(["image_path,caption", *lines]).encode())
    split = {"test_images": 3, "validation_images": 0}
    data = data_of(project, captions_file=str(file), split=split, image={"allow_urls": True})
    assert (len(data.train), len(data.test), data.rejected) == (9, 3, 0)
    with pytest.raises(DataFormatError, match="leave nothing to train on"):
        data_of(project, captions_file=str(file), split=split)
