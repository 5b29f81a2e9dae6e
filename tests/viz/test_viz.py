"""Kedro-Viz shows pipelines, a sentence on every node and a preview of whatever a person would open."""

import json
import subprocess
import sys

import pytest

from viz.browser import needs_chromium, open_page
from viz.conftest import get, viz_server

pytest.importorskip("kedro_viz")
pytest.importorskip("websockets")

PREVIEWS = {
    "images": "TablePreview",
    "samples": "JSONPreview",
    "caption_table": "TablePreview",
    "rejected_samples": "TablePreview",
    "rejected_pictures": "JSONPreview",
    "collection_summary": "JSONPreview",
    "conversations": "JSONPreview",
    "train_conversations": "JSONPreview",
    "split_summary": "JSONPreview",
    "caption_statistics": "JSONPreview",
    "caption_length_plot": "PlotlyPreview",
    "data_page": "HTMLPreview",
    "image_sheet": "ImagePreview",
    "base_model": "TablePreview",
    "adapter": "TablePreview",
    "batch_preview": "JSONPreview",
    "training_log": "TablePreview",
    "training_summary": "JSONPreview",
    "left_out_samples": "TablePreview",
    "training_curves": "PlotlyPreview",
    "predictions": "TablePreview",
    "caption_metrics": "JSONPreview",
    "caption_scores": "TablePreview",
    "metrics_plot": "PlotlyPreview",
    "comparison_sheet": "ImagePreview",
    "comparison_report": "HTMLPreview",
}


@pytest.fixture(scope="module")
def nodes(viz):
    """Node's name → its metadata, of the default pipeline."""
    main = get(f"{viz}/api/main")
    return {node["name"]: {**get(f"{viz}/api/nodes/{node['id']}"), **node} for node in main["nodes"]}


def test_the_terminal_has_the_address_and_no_warning_of_a_library(viz, finished):
    said = (finished / "viz.log").read_text()
    assert f"Kedro-Viz is at {viz}/ (Ctrl-C to stop)" in said
    assert "Warning" not in said


def test_layers_are_those_of_the_data_folders(viz):
    assert get(f"{viz}/api/main")["layers"] == [
        "raw", "intermediate", "feature", "primary", "model_input", "models", "model_output", "reporting",
    ]  # fmt: skip


def test_all_pipelines_are_there(viz):
    names = {pipeline["id"] for pipeline in get(f"{viz}/api/main")["pipelines"]}
    assert names >= {"__default__", "data_engineering", "training", "evaluation", "inference", "export"}


def test_every_node_has_a_sentence_and_its_pipelines_tag(nodes):
    tasks = [node for node in nodes.values() if node["type"] == "task"]
    assert len(tasks) == 11
    for task in tasks:
        assert task["preview"]["content"].endswith("."), task["name"]
        assert {"data_engineering", "training", "evaluation"} & set(task["tags"]), task["name"]


def test_every_dataset_that_a_person_would_open_has_a_preview(nodes):
    shown = {
        name: node.get("preview_type") for name, node in nodes.items() if node["type"] == "data" and node.get("preview")
    }
    assert shown.items() >= PREVIEWS.items()


def test_previews_of_long_lists_hold_their_first_records_only(nodes):
    assert len(json.loads(nodes["conversations"]["preview"])) == 5
    assert len(nodes["images"]["preview"]["data"]) == 20
    assert len(nodes["comparison_report"]["preview"].split("<article")) - 1 == 8


def test_the_adapters_card_says_what_made_it(nodes):
    facts = dict(nodes["adapter"]["preview"]["data"])
    assert facts["prompt"] == "Describe this picture."
    assert facts["picture size"] == "112 x 112"
    assert facts["LoRA"] == "r 64, lora_alpha 16, lora_dropout 0.05"
    assert facts["read: train_conversations"] == facts["run"]


def test_the_committed_styles_are_used(nodes):
    assert nodes["train_adapter"]["node_extras"]["styles"]["themes"].keys() == {"light", "dark"}


@needs_chromium
def test_the_graph_shows_and_every_preview_opens_without_error_or_request_outside(viz, nodes, tmp_path):
    with open_page(tmp_path / "profile") as page:
        hints_off = {"KedroViz": json.dumps({"showFeatureHints": False})}
        page.open(viz, storage=hints_off)
        page.wait_for(f"document.querySelectorAll('.pipeline-node').length >= {len(PREVIEWS)}")
        for name in ("collect_samples", *PREVIEWS):
            _show(page, nodes[name]["id"])
            page.wait_for(f"document.querySelector('.pipeline-metadata__title')?.textContent.trim() == '{name}'")
            page.wait_for("!!document.querySelector('.pipeline-metadata__link')")
            page.js("document.querySelector('.pipeline-metadata__link').click()")
            page.wait_for("!!document.querySelector('.pipeline-metadata-modal')?.children.length")
            page.js("document.querySelector('.pipeline-metadata-modal__back').click()")
        outside = [url for url in page.requests if url.startswith("http") and not url.startswith(viz)]
        assert outside == []
        assert page.errors == []


def test_lite_shows_the_same_graph_where_torch_is_not_installed(finished, tmp_path):
    for package in ("torch", "transformers", "peft", "torchvision"):
        (tmp_path / f"{package}.py").write_text(f"raise ModuleNotFoundError('{package} is blocked')\n")
    with viz_server(finished, "--lite", env={"PYTHONPATH": str(tmp_path)}) as url:
        names = {node["name"] for node in get(f"{url}/api/main")["nodes"]}
    assert names >= {"collect_samples", "train_adapter", "build_report", *PREVIEWS}


def test_the_build_holds_the_graph_and_the_previews(finished):
    command = [sys.executable, "-m", "kedro", "viz", "build", "--include-previews"]
    done = subprocess.run(command, cwd=finished, capture_output=True, text=True, timeout=120, check=False)
    main = finished / "build" / "api" / "main"
    assert main.is_file(), done.stdout + done.stderr  # it ends with 0 even when it failed
    size = sum(path.stat().st_size for path in (finished / "build" / "api").rglob("*") if path.is_file())
    assert len(json.loads(main.read_text())["nodes"]) > 30
    assert 200_000 < size < 5_000_000


def _show(page, node_id):
    """Go to a node inside the app: no reload."""
    page.js(f"history.pushState({{}}, '', '/?pid=__default__&sid={node_id}')")
    page.js("dispatchEvent(new PopStateEvent('popstate', {state: {}}))")
