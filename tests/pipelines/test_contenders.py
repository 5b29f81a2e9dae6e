"""Adapters, merged models and servers caption the held-out pictures beside base and tuned, everything else equal."""

import json
import shutil

import pandas as pd
import pytest

from conftest import TINY_BASE
from evaluation.servers import FaultyServer, Reply, transformers_serve
from pipelines.conftest import SMALL
from qwen_vl_lora.exceptions import AdapterError, MissingArtifactError, ServerError
from qwen_vl_lora.runs.records import read_records, runs_folder

ADAPTER = "06_models/tiny/adapter"
PREDICTIONS = "07_model_output/tiny/predictions.csv"
THREE = ("base", "tuned", "delta")
STRONG = {"training_args": {"learning_rate": 0.05}}


def read(file):
    return pd.read_csv(file, keep_default_na=False, dtype=str)


def test_contenders_stand_beside_base_and_tuned_in_every_artifact(evaluated, run, newest, project, base_path, capsys):
    older, before = newest(ADAPTER).parent.name, read(newest(PREDICTIONS))
    run("training", "evaluation", **SMALL, **STRONG)
    plain, metrics = read(newest(PREDICTIONS)), json.loads(newest("08_reporting/tiny/caption_metrics.json").read_text())
    model = shutil.copytree(base_path("qwen2_vl"), project / "plain")
    with FaultyServer(lambda body: Reply("a red square")) as server:
        contenders = [
            {"name": "older", "adapter": older},
            {"name": "same", "model": model.name},
            {"name": "served", "server": {"address": server.address, "image_tokens": "ignore"}},
        ]
        run("evaluation", evaluation={"contenders": contenders}, **SMALL)
    table = read(newest(PREDICTIONS))
    assert table[plain.columns].equals(plain)
    assert table["older_caption"].tolist() == before["tuned_caption"].tolist()
    assert table["older_caption"].tolist() != plain["tuned_caption"].tolist()
    assert table["same_caption"].tolist() == plain["base_caption"].tolist()
    assert set(table["served_caption"]) == {"a red square"}
    told = json.loads(newest("08_reporting/tiny/caption_metrics.json").read_text())
    assert {side: told[side] for side in THREE} == {side: metrics[side] for side in THREE}
    assert told["contenders"]["same"] == {"scores": told["base"], "delta": told["delta"]}
    page = newest("08_reporting/tiny/comparison_report.html").read_text(encoding="utf-8")
    assert f"adapter {older}" in page
    assert "a red square" in page
    assert "served" in capsys.readouterr().out
    assert "| served | " in (newest(ADAPTER) / "README.md").read_text(encoding="utf-8")
    facts = read_records(runs_folder(project, "tiny"))[-1].facts["captions"]
    assert facts["older"]["adapter"]["path"] == f"data/{ADAPTER}/{older}/adapter"
    assert len(facts["older"]["adapter"]["sha256"]) == 64
    assert facts["same"]["model"]["path"] == "plain"
    assert facts["served"]["server"]["model"] == "captions"
    assert [facts[side]["taken"] for side in ("base", "tuned", "older", "same", "served")] == [6, 6, 6, 6, 0]


def test_contenders_that_cannot_be_used_stop_the_run_before_its_first_node(evaluated, run, newest, project, caplog):
    def refused(error, match, **contender):
        with pytest.raises(error, match=match):
            run("evaluation", evaluation={"contenders": [{"name": "x", **contender}]}, **SMALL)
        assert "encode_images" not in caplog.text

    caplog.clear()
    refused(MissingArtifactError, "evaluation.contenders: x names 'lost', which is neither .*versions", adapter="lost")
    refused(MissingArtifactError, "evaluation.contenders: x names the model 'lost', but there is no", model="lost")
    refused(MissingArtifactError, "conf has no .*safetensors", model="conf")
    other = shutil.copytree(newest(ADAPTER), project / "other")
    record = other / "adapter_record.json"
    facts = json.loads(record.read_text())
    facts["base_model"] |= {"name": "another base", "fingerprint": "0" * 64}
    record.write_text(json.dumps(facts))
    refused(AdapterError, "x names .*other, which was trained on another base .*Merge it into its own", adapter="other")


def test_a_contenders_server_that_is_gone_is_named_with_its_block(evaluated, run):
    gone = {"name": "gone", "server": {"address": "http://127.0.0.1:1/v1", "retries": 0}}
    with pytest.raises(ServerError, match="check evaluation.contenders: server.address with its port"):
        run("evaluation", evaluation={"contenders": [gone]}, **SMALL)


@pytest.mark.slow
def test_one_report_has_the_base_two_adapters_their_merged_model_and_a_server(run, newest, tmp_path):
    """The shipped base, two adapters of some steps, the newer one merged, and `transformers serve` of the base."""
    few = {"base_model": str(TINY_BASE), "generation": {"max_new_tokens": 40, "batch_size": 1}}
    short, long = ({"training_args": {"max_steps": steps, "warmup_steps": 0}} for steps in (5, 20))
    run("data_engineering", "training", "evaluation", **few, **short)
    older = newest(ADAPTER).parent.name
    run("training", "evaluation", "export", **few, **long)
    plain, metrics = read(newest(PREDICTIONS)), json.loads(newest("08_reporting/tiny/caption_metrics.json").read_text())
    with transformers_serve(TINY_BASE, tmp_path) as (address, _):
        contenders = [
            {"name": "older", "adapter": older},
            {"name": "merged", "model": str(newest("06_models/tiny/merged_model"))},
            {"name": "served", "server": {"address": address}},
        ]
        run("evaluation", evaluation={"contenders": contenders}, **few)
    table = read(newest(PREDICTIONS))
    assert table[plain.columns].equals(plain)
    assert table["served_caption"].tolist() == plain["base_caption"].tolist()
    assert table["merged_caption"].tolist() == plain["tuned_caption"].tolist()
    assert table["older_caption"].tolist() != plain["tuned_caption"].tolist()
    told = json.loads(newest("08_reporting/tiny/caption_metrics.json").read_text())
    assert told["contenders"]["served"]["scores"] == told["base"]
    assert {side: told[side] for side in THREE} == {side: metrics[side] for side in THREE}
    page = newest("08_reporting/tiny/comparison_report.html").read_text(encoding="utf-8")
    assert page.count("<dt>older ") == page.count("<dt>merged ") == page.count("<dt>served ") >= 6
