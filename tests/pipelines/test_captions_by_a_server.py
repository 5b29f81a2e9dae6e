"""A real `transformers serve` writes the captions that the model in this process writes, word for word."""

import json
import random

import pandas as pd
import pytest

from conftest import TINY_BASE
from evaluation.servers import transformers_serve
from qwen_vl_lora.tiny.drawing import draw_picture, random_scene

PLAIN = {"generation": {"max_new_tokens": 40}}


@pytest.fixture
def folder(tmp_path):
    """Eight pictures: of other sizes than the model's, one with transparency, one turned by EXIF, one JPEG."""
    album = tmp_path / "album"
    album.mkdir()
    rng = random.Random(5)
    for number in range(8):
        picture = draw_picture(random_scene(rng)).resize((100 + 10 * number, 120))
        if number == 1:
            picture.putalpha(picture.convert("L"))
        if number == 2:
            exif = picture.getexif()
            exif[0x0112] = 6
            picture.save(album / f"{number}.jpg", quality=95, exif=exif)
            continue
        picture.save(album / f"{number}.png")
    return album


def read(file):
    return pd.read_csv(file, keep_default_na=False, dtype=str)


def captions_of(newest):
    return read(newest("07_model_output/tiny/captions.csv"))


def record_of(project):
    folder = project / "data/08_reporting/tiny/runs"
    return json.loads((max(folder.iterdir()) / "record.json").read_text())


def test_a_server_of_the_base_writes_its_captions(run, newest, folder, project, tmp_path):
    asked = {"images": str(folder), "adapter": "none"}
    run("inference", inference=asked, base_model=str(TINY_BASE), **PLAIN)
    here = captions_of(newest)
    with transformers_serve(TINY_BASE, tmp_path) as (address, _):
        server = {"address": address}
        run("inference", inference={**asked, "server": server}, base_model=str(TINY_BASE), **PLAIN)
    there = captions_of(newest)
    assert here.equals(there)
    assert (here["caption"].str.len() > 20).all()
    facts = record_of(project)["server"]
    assert (facts["kind"], facts["model"]) == ("transformers", str(TINY_BASE))
