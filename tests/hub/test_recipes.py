"""The recipes as a user runs them, against a hub on loopback: the endpoint, the caches and public parameters differ."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from kedro.framework.session import KedroSession
from kedro.framework.startup import bootstrap_project

import warm
from hub.hugging_face import HuggingFaceServer
from hub.loopback import COCO, MODEL, add_coco, files_of, hub, hub_environment  # noqa: F401
from hub.server import Fault, HubServer
from qwen_vl_lora.model.families import family_of_published
from samples.pictures import jpeg, write

PROJECT = Path(__file__).parents[2]
MODEL_7B = "Qwen/Qwen2.5-VL-7B-Instruct"
QWEN3_VL_2B, QWEN3_VL_4B = "Qwen/Qwen3-VL-2B-Instruct", "Qwen/Qwen3-VL-4B-Instruct"
COCO_2017 = "lmms-lab/COCO-Caption2017"
WEIGHTS = "model.safetensors"
ON_A_CPU = "device=cpu,generation.max_new_tokens=8,scoring.bootstrap_samples=10"


class Machine:
    """A user's machine: the project's configuration, an empty cache, and `kedro`."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.project = folder / "project"
        shutil.copytree(PROJECT / "conf", self.project / "conf")
        shutil.copy(PROJECT / "pyproject.toml", self.project)
        shutil.copy(PROJECT / ".telemetry", self.project)
        (self.project / "src").mkdir()
        self.environment = os.environ | environment
        self.cache = Path(environment["MODELSCOPE_CACHE"])

    def start(self, *arguments: str) -> warm.Process:
        command = [sys.executable, "-m", "kedro", "run", *arguments]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return warm.start(command, cwd=self.project, env=self.environment, **streams)

    def run(self, *arguments: str) -> tuple[int, str]:
        """Exit status and what was said, in one line."""
        child = self.start(*arguments)
        said, _ = child.communicate(timeout=280)
        return child.returncode, " ".join(said.split())

    def newest(self, path: str) -> Path:
        folder = self.project / "data" / path
        return max(folder.iterdir()) / folder.name

    def load(self, path: str):
        return json.loads(self.newest(path).read_text(encoding="utf-8"))

    def artifacts(self) -> list[Path]:
        return [path for path in (self.project / "data").rglob("*") if path.is_file()]


@pytest.fixture
def machine(hub, tmp_path):  # noqa: F811
    return Machine(tmp_path, hub_environment(hub, tmp_path))


def kill_in_the_middle_of_the_weights(
    machine: Machine, server: HubServer, model: str, size: int, *arguments: str
) -> tuple[Path, int]:
    """Start a run and kill it while the base's weights arrive. Returns their final place and how many bytes it had."""
    server.fail(WEIGHTS, Fault(delay=0.7))
    child = machine.start(*arguments)
    weights = machine.cache / "models" / model.replace("/", "--") / "snapshots" / "master" / WEIGHTS
    partial = weights.with_name(f"{WEIGHTS}.incomplete")
    deadline = time.monotonic() + 120
    while not (partial.exists() and partial.stat().st_size):
        assert child.poll() is None, child.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    had = partial.stat().st_size
    assert 0 < had < size
    return weights, had


def groups_of(env: str) -> dict:
    return yaml.safe_load((PROJECT / "conf" / env / "parameters.yml").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "env", ["qwen2_vl_2b_coco", "qwen2_5_vl_7b", "own_captions_qwen", "qwen3_vl_4b", "qwen3_vl_2b_coco", "qwen3_5_4b"]
)
def test_a_recipe_states_every_key_that_decides_a_training(env):
    base, recipe = groups_of("base"), groups_of(env)
    base["training_args"].pop("save_on_each_node", None)  # decides nothing: all machines share the workspace
    for group in ("captions", "prompt", "split", "lora", "training_args", "generation", "scoring"):
        assert set(recipe[group]) >= set(base[group]), group
    assert {"max_length", "vision", "rows", "resume", "device"} <= set(recipe)
    assert {"resized_height", "resized_width", "min_pixels", "max_pixels"} <= set(recipe["image"])


def test_the_recipes_carry_the_tutorials_values():
    two, seven = groups_of("qwen2_vl_2b_coco"), groups_of("qwen2_5_vl_7b")
    same = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "learning_rate": 1e-4, "bf16": True}
    same |= {"lr_scheduler_type": "linear", "logging_steps": 10, "gradient_checkpointing": True}
    for recipe in (two, seven):
        assert same.items() <= recipe["training_args"].items()
        assert (recipe["lora"]["r"], recipe["lora"]["lora_alpha"], recipe["lora"]["lora_dropout"]) == (64, 16, 0.05)
        assert recipe["generation"]["max_new_tokens"] == 128
        assert recipe["generation"]["repetition_penalty"] == 1.0
        assert (recipe["max_length"], recipe["split"]["test_images"], recipe["device"]) == (8192, 4, "cuda")
    assert {"num_train_epochs": 2, "save_steps": 100}.items() <= two["training_args"].items()
    assert {"num_train_epochs": 5, "save_steps": 74}.items() <= seven["training_args"].items()
    assert (two["prompt"]["user"], two["captions"]["num_rows"]) == ("COCO Yes:", 500)
    assert (seven["prompt"]["user"], seven["prompt"]["override"]) == ("请描述这张图片的内容。", True)
    assert (two["image"]["resized_height"], seven["image"]["resized_height"]) == (280, 256)


def test_the_recipe_for_own_captions_on_a_real_base_carries_sound_values():
    recipe = groups_of("own_captions_qwen")
    arguments = {"learning_rate": 1e-4, "lr_scheduler_type": "cosine", "warmup_steps": 0.05, "num_train_epochs": 3}
    arguments |= {"bf16": True, "gradient_checkpointing": True, "load_best_model_at_end": True}
    assert arguments.items() <= recipe["training_args"].items()
    assert recipe["training_args"]["eval_strategy"] == recipe["training_args"]["save_strategy"]
    assert (recipe["lora"]["r"], recipe["lora"]["lora_alpha"]) == (16, 32)
    size = {"resized_height": None, "resized_width": None, "min_pixels": 65_536, "max_pixels": 262_144}
    assert size.items() <= recipe["image"].items()
    assert (recipe["max_length"], recipe["generation"]["max_new_tokens"], recipe["device"]) == (2048, 512, "cuda")
    assert (recipe["split"]["test_images"], recipe["split"]["validation_images"]) == ("10% up to 64", "5%")
    assert groups_of("own_captions")["split"]["test_images"] == "10% up to 64"


def test_the_qwen3_recipes_carry_todays_values():
    four, two, hybrid = groups_of("qwen3_vl_4b"), groups_of("qwen3_vl_2b_coco"), groups_of("qwen3_5_4b")
    same = {"learning_rate": 1e-4, "lr_scheduler_type": "cosine", "warmup_steps": 0.05, "bf16": True}
    size = {"resized_height": None, "resized_width": None, "min_pixels": 65_536, "max_pixels": 262_144}
    for recipe in (four, two, hybrid):
        assert (same | {"gradient_checkpointing": True}).items() <= recipe["training_args"].items()
        assert size.items() <= recipe["image"].items()
        assert (recipe["lora"]["r"], recipe["lora"]["lora_alpha"]) == (16, 32)
        assert (recipe["vision"], recipe["device"]) == ("frozen", "cuda")
        assert recipe["swanlab"]["mode"] == "offline"
    assert (four["rows"], two["rows"], hybrid["rows"]) == ("shared", "shared", "separate")
    assert four["training_args"]["load_best_model_at_end"]
    assert (two["captions"]["num_rows"], two["split"]["test_images"]) == (2500, 500)


@pytest.mark.parametrize("env", ["qwen2_vl_2b_coco", "qwen2_5_vl_7b", "qwen3_vl_4b", "qwen3_vl_2b_coco", "qwen3_5_4b"])
def test_a_recipe_adapts_all_linear_layers_of_its_language_model(env):
    base = yaml.safe_load((PROJECT / "conf" / env / "globals.yml").read_text(encoding="utf-8"))["base_model"]
    name = base.partition("@")[0]
    geometry = family_of_published(name).published_geometry(name)
    assert set(groups_of(env)["lora"]["target_modules"]) == set(geometry.projections)


@pytest.mark.slow
def test_the_coco_recipe_downloads_trains_and_evaluates_and_a_killed_download_goes_on(machine, hub, base_path):  # noqa: F811
    files = files_of(base_path("qwen2_vl"))
    hub.add_model(MODEL, files)
    add_coco(hub, [jpeg(seed) for seed in range(20)])
    arguments = ("--env", "qwen2_vl_2b_coco", "--params", ON_A_CPU)
    weights, had = kill_in_the_middle_of_the_weights(machine, hub, MODEL, len(files[WEIGHTS]), *arguments)
    pictures = [request.file for request in hub.requests if request.path.startswith("/storage/")]
    assert len(pictures) == len(set(pictures)) == 20

    status, said = machine.run(*arguments)
    assert status == 0, said[-3000:]
    assert weights.read_bytes() == files[WEIGHTS]
    assert hub.asked_for(WEIGHTS)[-1].range == f"bytes={had}-"
    assert [request.file for request in hub.requests if request.path.startswith("/storage/")] == pictures
    summary = machine.load("05_model_input/qwen2_vl_2b_coco/split_summary.json")
    assert summary["samples"] == {"train": 16, "validation": 0, "test": 4}
    record = json.loads((machine.newest("06_models/qwen2_vl_2b_coco/adapter") / "adapter_record.json").read_text())
    assert f"{MODEL}" in json.dumps(record)
    assert machine.load("08_reporting/qwen2_vl_2b_coco/caption_metrics.json")["num_images"] == 4


@pytest.mark.slow
def test_the_7b_recipe_trains_on_the_tutorials_own_json(machine, hub, base_path, tmp_path):  # noqa: F811
    files = files_of(base_path("qwen2_5_vl", tied=False))
    hub.add_model(MODEL_7B, files)
    pictures = tmp_path / "elsewhere"
    records = [
        {
            "id": f"identity_{seed}",
            "conversations": [
                {
                    "from": "user",
                    "value": f"COCO Yes: <|vision_start|>{write(pictures / f'{seed}.jpg', jpeg(seed))}<|vision_end|>",
                },
                {"from": "assistant", "value": f"A picture, number {seed}."},
            ],
        }
        for seed in range(12)
    ]
    file = write(machine.project / "data_vl.json", json.dumps(records).encode())
    given = f"captions_file={file},{ON_A_CPU}"
    status, said = machine.run("--env", "qwen2_5_vl_7b", "--params", given)
    assert status != 0
    assert f"add its folder to image.allowed_roots: [{pictures}]" in said
    arguments = ("--env", "qwen2_5_vl_7b", "--params", f"{given},image.allowed_roots=[{pictures}]")
    weights, had = kill_in_the_middle_of_the_weights(machine, hub, MODEL_7B, len(files[WEIGHTS]), *arguments)
    status, said = machine.run(*arguments)
    assert status == 0, said[-3000:]
    assert weights.read_bytes() == files[WEIGHTS]
    assert hub.asked_for(WEIGHTS)[-1].range == f"bytes={had}-"
    conversation = machine.load("03_primary/qwen2_5_vl_7b/conversations.json")[0]["conversations"]
    assert conversation[0]["value"].startswith("请描述这张图片的内容。 <|vision_start|>")
    assert machine.load("08_reporting/qwen2_5_vl_7b/caption_metrics.json")["num_images"] == 4


@pytest.fixture
def coco_2017(machine):
    """`coco_2017(pictures)`: the table of the recipe on a Hugging Face hub, five captions to a picture."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with HuggingFaceServer() as server:
        machine.environment["HF_ENDPOINT"] = server.endpoint

        def add(pictures):
            rows = [
                {
                    "question_id": f"{number:012}.jpg",
                    "image": {"bytes": picture, "path": f"{number:012}.jpg"},
                    "question": "Please carefully observe the image and come up with a caption for the image",
                    "answer": [f"A picture, number {number}, said in way {way}." for way in range(5)],
                    "id": number,
                    "license": 1,
                    "file_name": f"{number:012}.jpg",
                    "coco_url": f"http://images.cocodataset.org/val2017/{number:012}.jpg",
                    "height": 12,
                    "width": 16,
                    "date_captured": "2013-11-14 17:02:52",
                }
                for number, picture in enumerate(pictures)
            ]
            file = io.BytesIO()
            pq.write_table(pa.Table.from_pylist(rows), file)
            server.add(COCO_2017, {"data/val-00000-of-00002.parquet": file.getvalue()})

        yield add


def test_a_picture_of_coco_2017_has_all_its_captions_on_one_side(machine, coco_2017):
    coco_2017([jpeg(seed, (16, 12)) for seed in range(30)])
    given = ("--params", "split.test_images=6")
    status, said = machine.run("--env", "qwen3_vl_2b_coco", "--pipeline", "data_engineering", *given)
    assert status == 0, said[-3000:]
    summary = machine.load("05_model_input/qwen3_vl_2b_coco/split_summary.json")
    assert summary["samples"] == {"train": 120, "validation": 0, "test": 30}
    assert summary["images"] == {"train": 24, "validation": 0, "test": 6}
    talks = machine.load("03_primary/qwen3_vl_2b_coco/conversations.json")
    turns = [[turn["value"] for turn in talk["conversations"]] for talk in talks[:2]]
    assert turns[0][0] == turns[1][0]
    assert turns[0][0].startswith("Describe this picture in one sentence.")
    assert [answer for _, answer in turns] == [f"A picture, number 0, said in way {way}." for way in (0, 1)]


@pytest.mark.slow
def test_the_qwen3_coco_recipe_trains_shared_rows_after_a_killed_download(machine, hub, base_path, coco_2017):  # noqa: F811
    files = files_of(base_path("qwen3_vl"))
    hub.add_model(QWEN3_VL_2B, files)
    coco_2017([jpeg(seed) for seed in range(12)])
    arguments = ("--env", "qwen3_vl_2b_coco", "--params", f"{ON_A_CPU},split.test_images=4")
    weights, had = kill_in_the_middle_of_the_weights(machine, hub, QWEN3_VL_2B, len(files[WEIGHTS]), *arguments)
    status, said = machine.run(*arguments)
    assert status == 0, said[-3000:]
    assert weights.read_bytes() == files[WEIGHTS]
    assert hub.asked_for(WEIGHTS)[-1].range == f"bytes={had}-"
    preview = machine.load("08_reporting/qwen3_vl_2b_coco/batch_preview.json")
    assert len(preview["sample_ids"]) > len(preview["rows"])
    assert machine.load("08_reporting/qwen3_vl_2b_coco/caption_metrics.json")["num_images"] == 4


@pytest.mark.slow
def test_the_qwen3_recipe_trains_on_your_own_table_in_chinese(machine, hub, base_path):  # noqa: F811
    files = files_of(base_path("qwen3_vl"))
    hub.add_model(QWEN3_VL_4B, files)
    lines = [f"{write(machine.project / f'{seed}.jpg', jpeg(seed)).name},第 {seed} 张图片。" for seed in range(20)]
    write(machine.project / "captions.csv", "\n".join(["image_path,caption", *lines]).encode())
    given = f"captions_file=captions.csv,prompt.user=请描述这张图片的内容。,{ON_A_CPU}"
    arguments = ("--env", "qwen3_vl_4b", "--params", given)
    weights, had = kill_in_the_middle_of_the_weights(machine, hub, QWEN3_VL_4B, len(files[WEIGHTS]), *arguments)
    status, said = machine.run(*arguments)
    assert status == 0, said[-3000:]
    assert weights.read_bytes() == files[WEIGHTS]
    assert hub.asked_for(WEIGHTS)[-1].range == f"bytes={had}-"
    conversation = machine.load("03_primary/qwen3_vl_4b/conversations.json")[0]["conversations"]
    assert conversation[0]["value"].startswith("请描述这张图片的内容。 <|vision_start|>")


def test_500_rows_of_coco_give_496_training_and_4_test_samples(machine, hub):  # noqa: F811
    add_coco(hub, [jpeg(seed, (16, 12)) for seed in range(510)])
    status, said = machine.run("--env", "qwen2_vl_2b_coco", "--pipeline", "data_engineering")
    assert status == 0, said[-3000:]
    summary = machine.load("05_model_input/qwen2_vl_2b_coco/split_summary.json")
    assert summary["samples"] == {"train": 496, "validation": 0, "test": 4}
    first = machine.load("03_primary/qwen2_vl_2b_coco/conversations.json")[0]["conversations"]
    assert first[0]["value"].startswith("COCO Yes: <|vision_start|>data/02_intermediate/qwen2_vl_2b_coco/images/files/")
    assert first[1]["value"] == "A picture, number 0."


def test_without_a_gpu_the_recipe_stops_at_once_and_says_so(machine, hub, base_path):  # noqa: F811
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    hub.add_model(MODEL, files_of(base_path("qwen2_vl")))
    add_coco(hub, [jpeg()])
    status, said = machine.run("--env", "qwen2_vl_2b_coco")
    assert status != 0
    assert "device: cuda is asked for, but torch sees no CUDA device here" in said
    assert hub.asked_for(WEIGHTS) == []
    assert machine.artifacts() == []


@pytest.mark.parametrize("arguments", [(), ("--pipeline", "data_engineering")])
def test_without_network_the_recipe_stops_before_any_node(machine, arguments):
    machine.environment["MODELSCOPE_ENDPOINT"] = "http://127.0.0.1:1"
    status, said = machine.run("--env", "qwen2_vl_2b_coco", *arguments, "--params", "device=cpu")
    assert status != 0
    assert "cannot be reached" in said
    assert "Traceback" not in said
    assert "collect_samples:" not in said
    assert machine.artifacts() == []


def test_a_script_without_consent_stops_the_recipe(machine, hub):  # noqa: F811
    add_coco(hub, [jpeg()])
    catalog = machine.project / "conf" / "qwen2_vl_2b_coco" / "catalog.yml"
    catalog.write_text(catalog.read_text().replace("trust_remote_code: true", "trust_remote_code: false"))
    status, said = machine.run("--env", "qwen2_vl_2b_coco", "--pipeline", "data_engineering")
    assert status != 0
    assert f"The dataset {COCO}@master is a Python script" in said
    assert "Traceback" not in said


@pytest.mark.slow
def test_a_recipe_trains_on_a_base_of_hugging_face_and_then_without_a_network(machine, base_path):
    lines = [f"{write(machine.project / f'{seed}.jpg', jpeg(seed)).name},Picture {seed}." for seed in range(20)]
    write(machine.project / "captions.csv", "\n".join(["image_path,caption", *lines]).encode())
    shared = machine.project / "conf" / "base" / "globals.yml"
    shared.write_text(shared.read_text().replace("hub: modelscope", "hub: huggingface"))
    arguments = ("--env", "qwen3_vl_4b", "--params", f"captions_file=captions.csv,{ON_A_CPU}")
    with HuggingFaceServer() as server:
        machine.environment["HF_ENDPOINT"] = server.endpoint
        server.add_model(QWEN3_VL_4B, files_of(base_path("qwen3_vl")))
        status, said = machine.run(*arguments)
        assert status == 0, said[-3000:]
    record = json.loads((machine.newest("06_models/qwen3_vl_4b/adapter") / "adapter_record.json").read_text())
    assert (record["base_model"]["name"], record["base_model"]["revision"]) == (f"hf:{QWEN3_VL_4B}", "main")
    card = (machine.newest("06_models/qwen3_vl_4b/adapter") / "README.md").read_text(encoding="utf-8")
    assert f"base_model: {QWEN3_VL_4B}\n" in card
    status, said = machine.run(*arguments, "--pipeline", "evaluation")
    assert status == 0, said[-3000:]
    (replay,) = list(machine.project.glob("data/08_reporting/qwen3_vl_4b/runs/*/conf/base/catalog.yml"))[:1]
    assert yaml.safe_load(replay.read_text(encoding="utf-8"))["base_model"]["hub"] == "huggingface"


@pytest.mark.parametrize("hub_named", ["", "hf:"])
def test_the_base_model_on_the_command_line_may_be_a_hub_id(machine, hub, hub_named):  # noqa: F811
    lines = [f"{write(machine.project / f'{seed}.jpg', jpeg(seed)).name},Picture {seed}." for seed in range(12)]
    write(machine.project / "captions.csv", "\n".join(["image_path,caption", *lines]).encode())
    parameters = f"captions_file=captions.csv,base_model={hub_named}Nobody/Nothing@v2,device=cpu"
    with HuggingFaceServer() as server:
        machine.environment["HF_ENDPOINT"] = server.endpoint
        status, said = machine.run("--env", "own_captions_qwen", "--params", parameters)
        assert bool(server.requests) is bool(hub_named)
    assert status != 0
    assert "has no model Nobody/Nothing at revision v2" in said
    assert "Traceback" not in said


def write_as_the_tutorial_does(table, folder: Path) -> Path:
    """Absolute paths into the folder beside it, in a JSON of the tutorials' form."""
    records = [
        {
            "id": f"identity_{number}",
            "conversations": [
                {"from": "user", "value": f"COCO Yes: <|vision_start|>{folder / name}<|vision_end|>"},
                {"from": "assistant", "value": caption},
            ],
        }
        for number, (name, caption) in enumerate(zip(table["image_path"], table["caption"], strict=True), start=1)
    ]
    return write(folder / "data_vl.json", json.dumps(records, ensure_ascii=False, indent=2).encode())


def write_table(table, folder: Path, **options) -> Path:
    table.to_csv(folder / "coco-2024-dataset.csv", **options)
    return folder / "coco-2024-dataset.csv"


def as_a_command(machine, file):
    status, said = machine.run(
        "--env", "own_captions", "--pipeline", "data_engineering", "--params", f"captions_file={file}"
    )
    assert status == 0, said[-3000:]


def in_this_process(machine, file):
    given = {"captions_file": str(file)}
    with contextlib.chdir(machine.project):
        bootstrap_project(machine.project)
        with KedroSession.create(project_path=machine.project, env="own_captions", runtime_params=given) as session:
            session.run(pipeline_names=["data_engineering"])


@pytest.mark.parametrize(
    ("written", "run"),
    [
        pytest.param(write_table, in_this_process, id="pandas"),
        pytest.param(
            lambda table, folder: write_table(table, folder, index=False), in_this_process, id="pandas without index"
        ),
        pytest.param(write_as_the_tutorial_does, as_a_command, id="the tutorial's data_vl.json"),
    ],
)
def test_500_jpegs_and_their_captions_work_as_they_are(machine, tmp_path, written, run):
    import pandas as pd

    folder = tmp_path / "mine, with a comma"
    names = [f"coco_2014_caption/IMG {number}.JPG" for number in range(500)]
    for number, name in enumerate(names):
        write(folder / name, jpeg(number, (16, 12)))
    table = pd.DataFrame({"image_path": names, "caption": [f"Caption, “{number}”" for number in range(500)]})
    run(machine, written(table, folder))
    with machine.newest("02_intermediate/own_captions/caption_table.csv").open(encoding="utf-8", newline="") as lines:
        assert [row["caption"] for row in csv.DictReader(lines)] == list(table["caption"])
    samples = machine.load("05_model_input/own_captions/split_summary.json")["samples"]
    assert samples == {"train": 450, "validation": 0, "test": 50}
