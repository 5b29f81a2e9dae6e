"""`qwen-vl-lora push` shows what it will send, refuses what does not belong together, and then sends it whole."""

from __future__ import annotations

import json
import shutil
import sys

import pytest

import command_line
from finished_project import finished_project
from hub.hugging_face import hugging_face  # noqa: F401


@pytest.fixture
def project(tmp_path_factory, base_path):
    return finished_project(tmp_path_factory.getbasetemp(), base_path("qwen2_vl"))


@pytest.fixture
def push(project, hugging_face, monkeypatch):  # noqa: F811
    """`push("adapter", "--to", "hf:owner/name")`, with a token that may write."""
    monkeypatch.setenv("HF_TOKEN", "hf_planted_token")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")

    def call(*arguments):
        done = command_line.call([sys.executable, "-m", "qwen_vl_lora", "push", *arguments], project)
        assert "hf_planted_token" not in done.stdout + done.stderr
        return done

    return call


def said(done):
    return " ".join((done.stdout + done.stderr).split())


def newest(project, name):
    return max((project / "data" / "06_models" / "tiny" / name).iterdir()) / name


def sent(hugging_face, name="owner/name"):  # noqa: F811
    return hugging_face.models[name, "main"].files


def test_nothing_is_sent_before_it_was_shown(push, project, hugging_face):  # noqa: F811
    done = push("adapter", "--to", "hf:owner/name")
    assert done.returncode == 0, said(done)
    for path in newest(project, "adapter").iterdir():
        assert f"{path.stat().st_size:,} bytes {path.name}" in said(done)
    assert f"would go to hf:owner/name@main on {hugging_face.endpoint}, private" in said(done)
    assert "of recipe tiny, CIDEr" in said(done)
    assert "Nothing was sent. Add --yes to send." in said(done)
    assert hugging_face.requests == []


def test_an_adapter_goes_with_its_card_and_record_to_a_private_repository(push, project, hugging_face):  # noqa: F811
    done = push("adapter", "--to", "hf:owner/name", "--yes")
    assert done.returncode == 0, said(done)
    files = sent(hugging_face)
    assert files == {path.name: path.read_bytes() for path in newest(project, "adapter").iterdir()}
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors", "adapter_record.json"} <= set(files)
    assert hugging_face.private == {"owner/name": True}
    assert push("adapter", "--to", "hf:owner/open", "--public", "--yes").returncode == 0
    assert hugging_face.private["owner/open"] is False


def test_a_merged_model_goes_with_the_record_of_its_adapter(push, project, hugging_face):  # noqa: F811
    done = push("merged", "--to", "hf:owner/name", "--yes")
    assert done.returncode != 0
    assert "No merged model at all was exported in this project" in said(done)
    given = "device=cpu,captions.num_rows=60,split.test_images=12,split.validation_images=4"
    command = [sys.executable, "-m", "kedro", "run", "--pipeline", "export", "--params", given]
    exported = command_line.call(command, project)
    assert exported.returncode == 0, said(exported)
    done = push("merged", "--to", "hf:owner/name", "--yes")
    assert done.returncode == 0, said(done)
    files = sent(hugging_face)
    merged = {path.name: path.read_bytes() for path in newest(project, "merged_model").iterdir() if path.is_file()}
    record = (newest(project, "adapter") / "adapter_record.json").read_bytes()
    assert files == merged | {"adapter_record.json": record}


def test_an_adapter_that_was_never_evaluated_is_sent_with_a_word(push, project):
    for file in project.glob("data/08_reporting/tiny/runs/*/record.json"):
        record = json.loads(file.read_text())
        record.get("results", {}).pop("caption_metrics", None)
        file.write_text(json.dumps(record))
    assert "of recipe tiny, never evaluated" in said(push("adapter", "--to", "hf:owner/name"))


def test_an_adapter_of_another_base_is_refused(push, project, base_path, hugging_face):  # noqa: F811
    other = shutil.copytree(base_path("qwen2_5_vl"), project / "other")
    done = push("adapter", "--to", "hf:owner/name", "--yes", "--params", f"base_model={other}")
    assert done.returncode != 0
    assert "does not fit the base model: trained with" in said(done)
    done = push("adapter", "--to", "hf:owner/name", "--yes", "--params", "base_model=hf:owner/base")
    assert done.returncode != 0
    assert "Base model hf:owner/base is not on this machine" in said(done)
    assert hugging_face.requests == []


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("adapter", "--to", "owner/name"), "expected hf:owner/name or ms:owner/name; got 'owner/name'"),
        (("adapter", "--to", "hf:name"), "expected hf:owner/name or ms:owner/name; got 'hf:name'"),
        (("adapter", "--to", "hf:owner/name", "--version", "v9"), "No adapter v9 was trained in this project"),
        (("merged", "--to", "hf:owner/name", "--version", "v9"), "No merged model v9 was exported in this project"),
    ],
)
def test_a_target_or_version_that_is_not_there_is_one_message(push, arguments, expected):
    done = push(*arguments)
    assert done.returncode != 0
    assert expected in said(done)
    assert "Traceback" not in said(done)
