"""`qwen-vl-lora plan` foresees what training does, needs no weights, and writes nothing."""

import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from kedro.framework.startup import bootstrap_project

from command_line import call, make_project
from finished_project import SLICE, finished_project
from qwen_vl_lora.commands.plan import plan as command
from qwen_vl_lora.exceptions import DataFormatError, MissingArtifactError, ParameterError
from samples.pictures import jpeg

SAME = ",".join(
    f"{group}.{key}={value}"
    for group, values in SLICE.items()
    if isinstance(values, dict)
    for key, value in values.items()
)
"""The settings of the finished run, as `--params` takes them."""


@pytest.fixture
def finished(tmp_path_factory, base_path):
    return finished_project(tmp_path_factory.getbasetemp(), base_path("qwen2_vl"))


@pytest.fixture
def plan(monkeypatch, tmp_path):
    """`plan(project, *arguments)`: what it prints."""
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("COLUMNS", "160")

    def call(project, *arguments):
        monkeypatch.chdir(project)
        bootstrap_project(project)
        monkeypatch.setattr("sys.argv", ["qwen-vl-lora", "plan", *arguments])
        result = CliRunner().invoke(command, list(arguments))
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.output[result.output.index("{") :] if "--json" in arguments else result.output

    return call


def newest(project, path):
    folder = project / "data" / path
    return sorted(folder.iterdir())[-1] / folder.name


def files(project):
    return {path for path in project.rglob("*") if path.is_file() and "logs" not in path.parts}


def test_a_plan_foresees_what_the_training_then_did(finished, plan):
    before = files(finished)
    foreseen = json.loads(plan(finished, "--json", "--params", SAME))
    summary = json.loads(newest(finished, "08_reporting/tiny/training_summary.json").read_text())
    split = json.loads(newest(finished, "05_model_input/tiny/split_summary.json").read_text())
    assert foreseen["steps"] == summary["steps"]
    assert foreseen["samples"] == {name: split["samples"][name] for name in ("train", "validation", "test")}
    assert foreseen["trainable_parameters"] == summary["trainable_parameters"]
    assert foreseen["speed"]["samples_per_second"] == summary["samples_per_second"]
    shown = foreseen["samples"]["train"] * summary["epochs"] / summary["samples_per_second"]
    assert foreseen["seconds"] == pytest.approx(shown)
    shards = sum(path.stat().st_size for path in (finished / "data/04_feature").rglob("*.safetensors"))
    assert foreseen["features"] < shards < foreseen["features"] + 300 * foreseen["pictures"]
    assert foreseen["image_tokens"]["max"] == 16
    preview = json.loads(newest(finished, "08_reporting/tiny/batch_preview.json").read_text())
    assert foreseen["tokens"]["min"] <= preview["rows"][0]["tokens"]
    assert foreseen["data"].startswith("train_conversations 2")
    assert files(finished) == before


def test_each_stage_takes_as_long_as_the_last_run_says(finished, plan):
    foreseen = json.loads(plan(finished, "--json", "--within", "1.5min", "--params", SAME))
    (record,) = (finished / "data/08_reporting/tiny/runs").glob("*/record.json")
    did = json.loads(record.read_text())["work"]
    stages = {stage["name"]: stage for stage in foreseen["stages"]}
    assert list(stages) == ["collect_samples", "encode_images", "train_adapter", "generate_captions"]
    for name, work in did.items():
        assert sum(work["processes"].values()) == work["count"] == stages[name]["count"]
        assert work["unit"] == stages[name]["unit"]
        assert stages[name]["seconds"] == pytest.approx(work["count"] / work["per_second"])
        assert record.parent.name in stages[name]["pace"]["source"]
    assert stages["train_adapter"]["seconds"] == foreseen["seconds"]
    assert foreseen["within"] == {"seconds": 90, "processes": 1, "left_out": []}
    assert foreseen["stored_pictures"] == sum(
        path.stat().st_size for path in (finished / "data/02_intermediate/tiny/images/files").rglob("*.png")
    )
    page = " ".join(plan(finished, "--within", "0.001", "--params", SAME).split())
    assert "stored features pay" in page
    assert "processes are enough for below 1 s, by calculation" in page
    other = json.loads(plan(finished, "--json", "--params", f"{SAME},image.resized_height=56"))
    paces = {stage["name"]: stage["pace"] for stage in other["stages"]}
    assert paces["collect_samples"]
    assert paces["encode_images"] is paces["generate_captions"] is None
    assert "'soon' is not a time; use e.g. 90min, 2h or 3d" in plan(finished, "--within", "soon")


def test_before_any_run_the_source_gives_the_same_numbers(finished, plan, tmp_path, base_path):
    fresh = make_project(tmp_path / "fresh")
    before = files(fresh)
    given = f"{SAME},base_model={base_path('qwen2_vl')}"
    ahead = json.loads(plan(fresh, "--json", "--params", given))
    behind = json.loads(plan(finished, "--json", "--params", SAME))
    for name in ("pictures", "image_tokens", "features", "trainable_parameters", "samples_per_step"):
        assert ahead[name] == behind[name], name
    assert sum(ahead["samples"].values()) == sum(behind["samples"].values()) == 60
    assert (ahead["data"], ahead["seconds"]) == ("the source, read now", None)
    assert files(fresh) == before


def test_samples_that_max_length_would_leave_out_are_named(finished, plan):
    tokens = json.loads(plan(finished, "--json", "--params", SAME))["tokens"]
    limit = tokens["median"]
    foreseen = json.loads(plan(finished, "--json", "--params", f"{SAME},max_length={limit}"))
    assert foreseen["too_long"]
    assert foreseen["stops_on_too_long"]
    assert f"longer than max_length    │ {len(foreseen['too_long'])}: identity_" in plan(
        finished, "--params", f"{SAME},max_length={limit}"
    )
    with pytest.raises(DataFormatError, match="None of .* fits in max_length 5"):
        plan(finished, "--params", f"{SAME},max_length=5")


def test_stored_data_of_other_parameters_are_not_planned(finished, plan):
    with pytest.raises(
        ParameterError, match=r"captions.num_rows: 60 → 30\n.*kedro run --pipeline data_engineering"
    ) as no:
        plan(finished, "--params", SAME.replace("num_rows=60", "num_rows=30"))
    assert "--from-source" in str(no.value)
    other = SAME.replace("num_rows=60", "num_rows=30").replace("test_images=12", "test_images=5")
    foreseen = json.loads(plan(finished, "--json", "--from-source", "--params", other))
    assert sum(foreseen["samples"].values()) == 30


def test_a_recipe_whose_base_and_data_are_elsewhere_is_planned_by_published_sizes(plan, tmp_path):
    fresh = make_project(tmp_path / "fresh")
    recipe = ("--env", "qwen2_vl_2b_coco", "--samples-per-second", "8")
    foreseen = json.loads(plan(fresh, "--json", *recipe, "--gpu-memory", "4GB"))
    assert (foreseen["steps"], foreseen["samples"]["train"], foreseen["seconds"]) == (62, 496, 124.0)
    assert foreseen["image_tokens"]["max"] == 100
    assert foreseen["trainable_parameters"] == 73_859_072
    assert foreseen["features"] == 500 * 100 * 1536 * 2
    assert foreseen["download"] == pytest.approx(4.43e9, rel=0.01)
    assert foreseen["tokens_are_estimated"]
    fits = {need["batch_size"]: need["fits"] for need in foreseen["memory"]}
    assert fits == dict.fromkeys((1, 2, 4, 8, 16), False)
    assert {change["setting"]: change["bytes"] < 4 * 2**30 for change in foreseen["changes"]}["quantization: nf4"]
    by_itself = (
        "--params",
        "training_args.per_device_train_batch_size=auto,training_args.gradient_accumulation_steps=16",
    )
    assert "auto would take 16 captions" in plan(fresh, *recipe, *by_itself, "--gpu-memory", "24GB")
    page = plan(fresh, *recipe, "--gpu-memory", "24GB")
    assert "fits ← configured" in page
    assert "does not fit" not in page
    assert "124 s at 8 samples/s (stated)" in page
    assert "rough estimate" not in page


def test_without_a_speed_there_are_rough_times_that_say_what_they_are(plan, tmp_path):
    fresh = make_project(tmp_path / "fresh")
    foreseen = json.loads(plan(fresh, "--json", "--env", "qwen2_vl_2b_coco"))
    assert foreseen["seconds"] is None
    times = {time["gpu"]: time for time in foreseen["rough_times"]}
    tokens = foreseen["tokens"]["median"]  # the stand-in captions are all as long
    language, head, lora = 1_310_195_712, 1536 * 151_936, 73_859_072
    low, high = (992 * (6 * (language * tokens + head * scored) + 8 * lora * tokens) for scored in (5, 40))
    assert low < times["RTX 3090"]["seconds"][0] * 71e12 * 0.4 < high
    assert low < times["RTX 3090"]["seconds"][1] * 71e12 * 0.1 < high
    assert times["H100"]["seconds"] == pytest.approx([62 * 4 * 28 * 0.002, 62 * 4 * 28 * 0.005])
    assert all(time["fits"] for time in times.values())
    page = " ".join(plan(fresh, "--env", "qwen2_vl_2b_coco").split())
    assert "rough estimate, not measured" in page
    assert "below, roughly" in page


@pytest.mark.parametrize(
    ("env", "levels", "hidden", "gigabytes"), [("qwen3_vl_4b", 4, 2560, 8.89), ("qwen3_5_4b", 1, 2560, 9.33)]
)
def test_a_plan_counts_all_levels_of_a_picture(plan, tmp_path, env, levels, hidden, gigabytes):
    fresh = make_project(tmp_path / "fresh")
    (fresh / "pictures").mkdir()
    for number in range(8):
        jpeg_file = fresh / "pictures" / f"{number}.jpg"
        jpeg_file.write_bytes(jpeg(number, (320, 320)))
        jpeg_file.with_suffix(".txt").write_text("A dog.")
    given = ("--params", "captions_file=pictures,split.test_images=2,split.validation_images=1")
    foreseen = json.loads(plan(fresh, "--json", "--env", env, *given))
    assert foreseen["image_tokens"]["max"] == 100
    assert foreseen["features"] == 8 * 100 * levels * hidden * 2
    assert foreseen["download"] == pytest.approx(gigabytes * 1e9, rel=0.01)
    assert any("linear attention" in note for note in foreseen["notes"]) == (env == "qwen3_5_4b")


def test_several_processes_take_larger_and_fewer_steps(plan, tmp_path):
    fresh = make_project(tmp_path / "fresh")
    recipe = ("--json", "--env", "qwen2_vl_2b_coco", "--params")
    foreseen = json.loads(plan(fresh, *recipe, "cluster.processes=4"))
    assert (foreseen["samples_per_step"], foreseen["steps"]) == (64, 16)
    assert foreseen["notes"] == ["4 processes: memory is per GPU, samples/s is for all together."]
    alone = json.loads(plan(fresh, *recipe, "cluster.processes=1"))
    assert alone["memory"] == foreseen["memory"]
    assert "auto: steps are planned for one process" in plan(fresh, *recipe, "cluster.processes=auto")


def test_an_unknown_base_that_is_elsewhere_is_refused(plan, tmp_path):
    fresh = make_project(tmp_path / "fresh")
    with pytest.raises(MissingArtifactError, match="sizes are known only for Qwen/Qwen2-VL-2B-Instruct, "):
        plan(fresh, "--params", "base_model=Somebody/Else")
    with pytest.raises(MissingArtifactError, match="Base model .*nowhere/else not found"):
        plan(fresh, "--params", "base_model=data/nowhere/else")


def test_the_defaults_of_the_tiny_base_are_not_planned_for_a_real_one(plan, tmp_path):
    fresh = make_project(tmp_path / "fresh")
    with pytest.raises(ParameterError, match=r"learning_rate: 0\.004[^$]*qwen-vl-lora plan --env own_captions_qwen"):
        plan(fresh, "--params", "captions.num_rows=8,split.test_images=2,split.validation_images=1,"
             "base_model=Qwen/Qwen2-VL-2B-Instruct")  # fmt: skip


def test_a_size_is_read_as_cards_are_sold(plan, tmp_path):
    fresh = make_project(tmp_path / "fresh")
    recipe = ("--json", "--env", "qwen2_vl_2b_coco", "--gpu-memory")
    sizes = [json.loads(plan(fresh, *recipe, text))["gpu_memory"] for text in ("24GB", "24 GiB", "24")]
    assert sizes == [24 * 2**30] * 3
    assert "'much' is not a size; use e.g. 24GB" in plan(fresh, "--gpu-memory", "much")


def test_standard_output_is_json_alone(finished):
    line = [sys.executable, "-m", "qwen_vl_lora", "plan", "--json", "--params", SAME]
    done = call(line, finished)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] > 0
    assert Path(finished).is_dir()
