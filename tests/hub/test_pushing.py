"""Files reach a repository on either hub by its real client: private unless told, whole, and never twice."""

from __future__ import annotations

import hashlib
import os

import pytest

from hub.hugging_face import hugging_face  # noqa: F401
from hub.loopback import hub  # noqa: F401
from hub.server import Fault
from qwen_vl_lora.exceptions import MissingArtifactError, QwenVLLoraError
from qwen_vl_lora.hub.pushing import push
from qwen_vl_lora.hub.repositories import parse_repository

# By the client itself, for what it sends to LFS.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

NAME = "owner/adapter"
LARGE = ("adapter_model.safetensors", "more.safetensors")


@pytest.fixture(params=["ms", "hf"])
def kind(request):
    return request.param


@pytest.fixture
def server(kind, request, monkeypatch):
    started = request.getfixturevalue("hub" if kind == "ms" else "hugging_face")
    # The client then sends large files by LFS over HTTP: its Xet protocol has no loopback server.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_planted_token")
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", "ms-planted-token")
    return started


@pytest.fixture
def repository(kind):
    found = parse_repository("model", f"{kind}:{NAME}")
    assert found is not None
    return found


@pytest.fixture
def files(tmp_path):
    """Two folders, as of a merged model and the record of its adapter."""
    contents = {name: os.urandom(40_000) for name in LARGE} | {"README.md": b"---\ntags: [lora]\n---\n# Adapter\n"}
    paths = {name: tmp_path / "folder" / name for name in contents} | {
        "record.json": tmp_path / "other" / "record.json"
    }
    for name, path in paths.items():
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(contents.get(name, b'{"run": 1}'))
    (tmp_path / "folder" / "notes.txt").write_text("not named, so not sent")
    return paths


def on_hub(server, repository):
    return server.models[NAME, repository.revision].files


def sent_blobs(server):
    return [request.file for request in server.requests if request.method == "PUT"]


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def is_private(server, kind):
    return server.private[NAME] if kind == "hf" else server.visibility[NAME] == 1


@pytest.mark.parametrize("public", [False, True])
def test_the_named_files_arrive_whole_in_a_repository_that_is_private_unless_told(
    server, kind, repository, files, public
):
    push(repository, files, public=public, message="Adapter of run 1")
    assert on_hub(server, repository) == {name: path.read_bytes() for name, path in files.items()}
    assert is_private(server, kind) is not public
    assert all(message.startswith("Adapter of run 1") for message in server.commits)
    assert sorted(path.name for path in files["README.md"].parent.iterdir()) == sorted(
        {"notes.txt", "README.md", *LARGE}
    )


def test_what_the_hub_has_already_is_not_sent_again(server, repository, files):
    push(repository, files, public=False, message="first")
    assert sorted(sent_blobs(server)) == sorted(sha256(files[name]) for name in LARGE)
    files[LARGE[1]].write_bytes(os.urandom(40_000))
    push(repository, files, public=False, message="second")
    assert sent_blobs(server)[2:] == [sha256(files[LARGE[1]])]
    assert on_hub(server, repository)[LARGE[1]] == files[LARGE[1]].read_bytes()


@pytest.mark.parametrize("kind", ["hf"], indirect=True)
def test_a_push_that_broke_off_goes_on_with_what_is_missing(server, repository, files):
    server.fail(sha256(files[LARGE[1]]), Fault(status=403))
    with pytest.raises(MissingArtifactError, match=r"returned an error.*403.*repeat the command to send the others"):
        push(repository, files, public=False, message="first")
    assert on_hub(server, repository) == {}
    before = len(sent_blobs(server))
    push(repository, files, public=False, message="second")
    assert sha256(files[LARGE[0]]) in sent_blobs(server)[:before]
    assert sent_blobs(server)[before:] == [sha256(files[LARGE[1]])]
    assert set(on_hub(server, repository)) == set(files)


def test_a_repository_that_is_public_already_gets_nothing_without_consent(server, repository, files):
    server.add_model(NAME, {}, repository.revision)
    with pytest.raises(QwenVLLoraError, match=r"is not private\. Nothing was sent.*--public"):
        push(repository, files, public=False, message="Adapter")
    assert on_hub(server, repository) == {}
    push(repository, files, public=True, message="Adapter")
    assert set(on_hub(server, repository)) == set(files)


@pytest.mark.parametrize("kind", ["hf"], indirect=True)
def test_without_a_token_one_message_names_the_variable_and_a_token_is_never_shown(
    server, repository, files, monkeypatch, capsys, caplog
):
    push(repository, files, public=False, message="Adapter")
    assert server.tokens == {"Bearer hf_planted_token"}
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(MissingArtifactError, match="HF_TOKEN") as fault:
        push(repository, files, public=False, message="Adapter")
    assert "hf_planted_token" not in "".join((str(fault.value), *capsys.readouterr(), caplog.text))


@pytest.mark.parametrize("kind", ["hf"], indirect=True)
def test_a_card_that_the_hub_refuses_is_named_before_a_weight_is_sent(server, repository, files):
    files["README.md"].write_text("---\nbase_model: ./models/base\n---\n")
    with pytest.raises(QwenVLLoraError, match=r"does not take a file: Invalid metadata in README\.md.*is not valid"):
        push(repository, files, public=False, message="Adapter")
    assert sent_blobs(server) == []


def test_without_a_network_it_says_so(kind, repository, files, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(MissingArtifactError, match=r"127.0.0.1:1.* cannot be reached"):
        push(repository, files, public=False, message="Adapter")
