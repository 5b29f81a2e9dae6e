"""A real `transformers serve` writes the captions that the model in this process writes, word for word."""

import itertools
import json
import random
import threading
import time

import pandas as pd
import pytest
from click.testing import CliRunner

from conftest import TINY_BASE
from evaluation.servers import FaultyServer, Reply, free_port, transformers_serve
from qwen_vl_lora.commands.caption import caption
from qwen_vl_lora.exceptions import MissingArtifactError, ParameterError, ServerError
from qwen_vl_lora.tiny.drawing import draw_picture, random_scene

ON_TINY_BASE = {"base_model": str(TINY_BASE), "generation": {"max_new_tokens": 40, "batch_size": 1}}


@pytest.fixture
def exported(run, once, newest):
    """The shipped base with an adapter of a few steps, evaluated, and their merged model."""
    few = {**ON_TINY_BASE, "training_args": {"max_steps": 10, "warmup_steps": 0}}
    once("tiny base, tuned", lambda: run("data_engineering", "training", "evaluation", "export", **few))
    return newest("06_models/tiny/merged_model")


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
    run("inference", inference=asked, **ON_TINY_BASE)
    here = captions_of(newest)
    with transformers_serve(TINY_BASE, tmp_path) as (address, _):
        run("inference", inference={**asked, "server": {"address": address}}, **ON_TINY_BASE)
    there = captions_of(newest)
    assert here.equals(there)
    assert (here["caption"].str.len() > 20).all()
    assert set(here["cut"]) == {"true", "false"}
    facts = record_of(project)
    assert (facts["server"]["kind"], facts["server"]["model"]) == ("transformers", str(TINY_BASE))
    assert "adapter" not in facts["datasets"]["read"]


def test_a_server_of_the_merged_model_writes_the_adapters_captions(exported, run, newest, folder, tmp_path):
    run("inference", inference={"images": str(folder)}, **ON_TINY_BASE)
    here = captions_of(newest)
    predictions = read(newest("07_model_output/tiny/predictions.csv"))
    assert (predictions["base_caption"] != predictions["tuned_caption"]).any()
    with transformers_serve(exported, tmp_path) as (address, _):
        server = {"address": address}
        run("inference", inference={"images": str(folder), "server": server}, **ON_TINY_BASE)
        run("evaluation", inference={"server": server}, scoring={"by_server": "tuned"}, **ON_TINY_BASE)
    assert here.equals(captions_of(newest))
    assert predictions.equals(read(newest("07_model_output/tiny/predictions.csv")))


def test_without_an_adapter_nothing_is_looked_for(run, newest, folder, project):
    run("inference", inference={"images": str(folder / "1.png"), "adapter": "none"}, prompt={"user": "What is it?"})
    assert len(captions_of(newest)) == 1
    with pytest.raises(
        ParameterError, match=r"inference.adapter is `none`, but the run uses an adapter in train_adapter"
    ):
        run("training", "inference", inference={"images": str(folder), "adapter": "none"})
    with pytest.raises(MissingArtifactError, match="adapter"):
        run("inference", inference={"images": str(folder)})


def test_texts_beside_the_pictures_are_written_once(run, newest, folder):
    asked = {"images": str(folder), "adapter": "none"}
    (folder / "3.txt").write_text("mine")
    with FaultyServer(lambda _: Reply("a\ndog")) as server:
        asked["server"] = {"address": server.address, "image_tokens": "ignore"}
        for pictures in (7, 0):
            run("inference", inference={**asked, "output": {"sidecars": "beside", "prefix": "mydog, "}}, device="cuda")
            assert len(server.asked) == pictures
            server.asked.clear()
            table = captions_of(newest)
            assert [reason.partition(":")[0] for reason in table["reason"]] == ["", "", "", "has_sidecar", *[""] * 4]
    assert set(table["caption"]) == {"a\ndog", ""}
    texts = {file.name: file.read_text() for file in folder.glob("*.txt")}
    assert texts == {f"{number}.txt": "mine" if number == 3 else "mydog, a dog\n" for number in range(8)}


def test_the_caption_command_asks_a_server(project, folder, base_path):
    paths = [str(folder / "1.png"), str(folder / "3.png")]
    more = f"base_model={base_path('qwen2_vl')},inference.server.image_tokens=ignore"
    replies = itertools.cycle([Reply("a cat", finish="length"), Reply(status=400, body=b"too dark")])
    with FaultyServer(lambda _: next(replies)) as server:
        options = ["--adapter", "none", "--server", server.address, "--params", f"{more},inference.server.requests=1"]
        done = CliRunner().invoke(caption, [*paths, *options], catch_exceptions=False)
    assert done.exit_code == 0
    assert f"{paths[0]}: a cat\n" in done.stdout
    assert f"{paths[0]}: the caption was cut after 96 tokens" in done.stderr
    assert f"{paths[1]}: not_captioned: the server refuses it, HTTP 400: too dark" in done.stderr


@pytest.mark.slow
def test_a_server_may_die_and_come_back_in_the_middle(run, newest, project, tmp_path):
    """200 pictures, the server killed twice: once it comes back while the run waits, once before the next run."""
    album = tmp_path / "many"
    album.mkdir()
    rng = random.Random(11)
    for number in range(200):
        draw_picture(random_scene(rng)).save(album / f"{number:03}.png")
    asked = {"images": str(album), "adapter": "none"}
    run("inference", inference=asked, **ON_TINY_BASE)
    here = captions_of(newest)
    port, notes = free_port(), project / "data/09_workspace/tiny/inference"
    old = set(notes.iterdir())
    address = f"http://127.0.0.1:{port}/v1"

    def written():
        (file,) = set(notes.iterdir()) - old or {None}
        return 0 if file is None else len(file.read_text().splitlines())

    def kill_and_restart():
        with transformers_serve(TINY_BASE, tmp_path, port) as (_, process):
            started.set()
            while written() < 60:
                time.sleep(0.05)
            process.kill()
        with transformers_serve(TINY_BASE, tmp_path, port) as (_, process):
            while written() < 120:
                time.sleep(0.05)
            process.kill()

    started = threading.Event()
    operator = threading.Thread(target=kill_and_restart)
    operator.start()
    started.wait(60)
    served = {**asked, "server": {"address": address}}
    with pytest.raises(ServerError, match=r"gave no answer after 7 attempts: .*Finished captions are kept"):
        run("inference", inference=served, **ON_TINY_BASE)
    operator.join()
    assert 120 <= written() < 200
    with transformers_serve(TINY_BASE, tmp_path, port):
        run("inference", inference=served, **ON_TINY_BASE)
    assert here.equals(captions_of(newest))
    lines = [json.loads(line)["question"] for line in (set(notes.iterdir()) - old).pop().read_text().splitlines()]
    assert len(lines) == len(set(lines)) == 200


@pytest.mark.slow
def test_a_server_writes_the_held_out_captions_of_both_sides(run, newest, tmp_path):
    """64 held-out pictures of the default run, tuned for some steps: base and merged model, each by its server."""
    whole = {**ON_TINY_BASE, "captions": {"num_rows": None}, "split": {"test_images": 64, "validation_images": 40}}
    whole |= {"training_args": {"max_steps": 40}, "generation": {"max_new_tokens": 96, "batch_size": 1}}
    run("data_engineering", "training", "evaluation", "export", **whole)
    predictions = read(newest("07_model_output/tiny/predictions.csv"))
    assert len(predictions) == 64
    for side, model in {"base": TINY_BASE, "tuned": newest("06_models/tiny/merged_model")}.items():
        with transformers_serve(model, tmp_path) as (address, _):
            run("evaluation", inference={"server": {"address": address}}, scoring={"by_server": side}, **whole)
        assert predictions.equals(read(newest("07_model_output/tiny/predictions.csv")))
