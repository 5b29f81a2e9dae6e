"""A base model from either hub is whole, verified and then used offline; anything else is one clear message."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from hub.hugging_face import HuggingFaceServer, hugging_face  # noqa: F401
from hub.loopback import MODEL, files_of, hub  # noqa: F401
from hub.server import Fault
from qwen_vl_lora.exceptions import BaseModelError, DataFormatError, MissingArtifactError
from qwen_vl_lora.hub.repositories import DEFAULT_REVISIONS, Repository, parse_repository
from qwen_vl_lora.hub.snapshots import snapshot_of

WEIGHTS = "model.safetensors"


@pytest.fixture
def files(base_path):
    return files_of(base_path("qwen2_vl"))


@pytest.fixture(params=["ms", "hf"])
def kind(request):
    return request.param


@pytest.fixture
def server(kind, request):
    return request.getfixturevalue("hub" if kind == "ms" else "hugging_face")


@pytest.fixture
def snapshot(server, kind, files):
    server.add_model(MODEL, files)
    return snapshot_of(Repository("model", MODEL, DEFAULT_REVISIONS[kind], kind))


@pytest.fixture
def on_hub(server, snapshot):
    """The repository on the hub, whose files a test changes."""
    return server.models[MODEL, snapshot.repository.revision]


def asked_files(requests):
    return {request.file for request in requests if request.path.endswith("/repo") or "/resolve/" in request.path}


def in_a_process(snapshot, lines):
    """Code of a new interpreter in which `found` is the snapshot."""
    names = "from qwen_vl_lora.hub.repositories import Repository\nfrom qwen_vl_lora.hub.snapshots import snapshot_of\n"
    return f"{names}found = snapshot_of({snapshot.repository!r})\n{lines}"


def test_a_snapshot_holds_what_the_hub_lists_and_a_manifest_of_it(snapshot, files):
    folder = snapshot.fetch()
    assert files_of(folder) == files
    tree = json.loads(snapshot.manifest.read_text())
    assert (tree["id"], tree["revision"]) == (MODEL, snapshot.repository.revision)
    assert {file["path"]: file["size"] for file in tree["files"]} == {name: len(data) for name, data in files.items()}


def test_a_verified_snapshot_is_used_without_a_single_request(snapshot, server):
    snapshot.fetch()
    before = len(server.requests)
    again = snapshot_of(snapshot.repository)
    again.check()
    again.fetch()
    assert len(server.requests) == before


@pytest.mark.parametrize("damage", ["altered", "cut", "missing", "link"])
def test_a_damaged_file_is_named_and_repaired_and_no_other_is_fetched(snapshot, server, files, damage, caplog):
    weights = snapshot.fetch() / WEIGHTS
    if damage == "altered":
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
    elif damage == "cut":
        os.truncate(weights, 100)
    else:
        weights.unlink()
        if damage == "link":
            weights.symlink_to("/etc/hostname")
    before = len(server.requests)
    assert any(WEIGHTS in fault for fault in snapshot_of(snapshot.repository).faults())
    snapshot_of(snapshot.repository).fetch()
    assert WEIGHTS in caplog.text
    assert files_of(snapshot.folder) == files
    assert not weights.is_symlink()
    assert asked_files(server.requests[before:]) == {WEIGHTS}


def test_a_touched_file_is_hashed_once_and_stays_good(snapshot):
    (snapshot.fetch() / WEIGHTS).touch()
    assert snapshot.faults() == []
    recorded = json.loads(snapshot.manifest.read_text())["files"]
    mtimes = {file["path"]: file["mtime_ns"] for file in recorded}
    assert mtimes[WEIGHTS] == (snapshot.folder / WEIGHTS).stat().st_mtime_ns


def test_a_snapshot_that_was_copied_to_read_only_storage_is_whole(snapshot):
    (snapshot.fetch() / WEIGHTS).touch()  # as a copy without time stamps is
    before = snapshot.manifest.read_bytes()
    check = "assert found.faults() == [], found.faults()\nfound.manifest.with_name('new').touch()"
    code = in_a_process(snapshot, check)
    rights = () if os.geteuid() else ("setpriv", "--inh-caps=-all", "--bounding-set=-dac_override,-fowner")
    if rights and (not shutil.which("setpriv") or subprocess.run([*rights, "true"], check=False).returncode):
        pytest.skip("root cannot give up its rights here")
    snapshot.manifest.parent.chmod(0o555)
    try:
        done = subprocess.run([*rights, sys.executable, "-c", code], capture_output=True, text=True, check=False)
    finally:
        snapshot.manifest.parent.chmod(0o755)
    assert "PermissionError" in done.stderr.splitlines()[-1], done.stderr  # of `new`: nothing can be written there
    assert "new" in done.stderr.splitlines()[-1]
    assert snapshot.manifest.read_bytes() == before


def test_bytes_that_are_broken_on_the_way_are_fetched_again(snapshot, server, files):
    server.fail(WEIGHTS, Fault(corrupt=True))
    snapshot.fetch()
    assert files_of(snapshot.folder) == files


def test_a_file_that_stays_corrupt_is_named_and_never_becomes_a_snapshot(snapshot, server):
    server.fail(WEIGHTS, *[Fault(corrupt=True)] * 9)
    with pytest.raises(
        MissingArtifactError,
        match=rf"not downloaded completely: {WEIGHTS}: .*(Hash mismatch|sha256 hash).*repeat the command",
    ):
        snapshot.fetch()
    assert snapshot.faults() is None


def test_errors_of_the_server_are_waited_out_and_then_named(snapshot, server, files, monkeypatch):
    monkeypatch.setattr("qwen_vl_lora.hub.hugging_face.PAUSES", (0, 0, 0, 0))
    server.fail(WEIGHTS, Fault(status=500))
    snapshot.fetch()
    assert files_of(snapshot.folder) == files
    (snapshot.folder / WEIGHTS).unlink()
    server.fail(WEIGHTS, *[Fault(status=500)] * 50)
    with pytest.raises(
        MissingArtifactError, match=f"not downloaded completely: {WEIGHTS}: .*500|returned an error .*500.*{WEIGHTS}"
    ):
        snapshot.fetch()
    assert len(server.asked_for(WEIGHTS)) <= 8


def test_a_listing_that_answers_500_is_one_message_within_seconds(snapshot, server):
    server.fail("listing", *[Fault(status=500)] * 50)
    with pytest.raises(MissingArtifactError, match=r"returned an error .*500"):
        snapshot.fetch()


@pytest.mark.parametrize(
    "name",
    ["../evil.json", "/etc/evil.json", "a/../../evil.json", "a\\..\\evil.json", "C:/evil.json", "evil\n.json"],
)
def test_a_name_that_leads_outside_stops_before_anything_is_written(snapshot, server, kind, on_hub, tmp_path, name):
    entry = {"type": "file", "path": name, "size": 1, "oid": "0" * 40}
    on_hub.listed.append(entry if kind == "hf" else {"Path": name, "Type": "blob", "Size": 1})
    with pytest.raises(DataFormatError, match="Nothing was written"):
        snapshot.fetch()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not asked_files(server.requests)


@pytest.mark.parametrize("kind", ["ms"], indirect=True)  # the other hub's client lists no links
def test_a_link_in_the_listing_stops_before_anything_is_written(snapshot, on_hub, tmp_path):
    on_hub.listed.append({"Path": "evil.json", "Type": "symlink", "Size": 1})
    with pytest.raises(DataFormatError, match="Nothing was written"):
        snapshot.fetch()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_pickles_and_code_are_not_downloaded(snapshot, on_hub):
    on_hub.files |= {"evil.py": b"1/0", "pytorch_model.bin": b"pickle", "assets/a.png": b"x"}
    folder = snapshot.fetch()
    assert not {"evil.py", "pytorch_model.bin", "assets"} & {path.name for path in folder.iterdir()}


def test_a_model_of_pickles_alone_is_refused_by_name(snapshot, on_hub, files):
    del files[WEIGHTS]
    on_hub.files = files | {"pytorch_model.bin": b"pickle"}
    with pytest.raises(BaseModelError, match=r"pytorch_model\.bin.*are not read"):
        snapshot.fetch()


def test_a_model_that_asks_for_its_own_code_is_refused_before_its_weights_come(snapshot, server, on_hub, files):
    config = json.loads(files["config.json"]) | {"auto_map": {"AutoModel": "modeling_evil.Evil"}}
    on_hub.files = files | {"config.json": json.dumps(config).encode()}
    with pytest.raises(BaseModelError, match=rf"{MODEL}@(master|main) asks for its own code"):
        snapshot.fetch()
    assert server.asked_for(WEIGHTS) == []


def test_a_missing_revision_is_named(snapshot, kind):
    with pytest.raises(MissingArtifactError, match=rf"has no model {MODEL} at revision v9"):
        snapshot_of(Repository("model", MODEL, "v9", kind)).fetch()


@pytest.mark.parametrize("kind", ["ms", "hf"])
def test_without_network_and_snapshot_one_message_says_what_to_do(kind, monkeypatch, tmp_path):
    for client, cache in (("MODELSCOPE", "MODELSCOPE_CACHE"), ("HF", "HF_HOME")):
        monkeypatch.setenv(f"{client}_ENDPOINT", "http://127.0.0.1:1")  # nobody listens there
        monkeypatch.setenv(cache, str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    started = time.monotonic()
    with pytest.raises(
        MissingArtifactError, match=r"cannot be reached.*Connect once.*base_model=path/to/folder"
    ) as told:
        snapshot_of(Repository("model", MODEL, "main", kind)).check()
    assert "Connection refused" in str(told.value)
    assert "ConnectionPool" not in str(told.value)
    assert time.monotonic() - started < 15
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_foreseen(snapshot, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))
    with pytest.raises(MissingArtifactError, match="Free some space, or set (MODELSCOPE_CACHE|HF_HOME) to"):
        snapshot.fetch()


def test_a_killed_download_goes_on_where_it_was(snapshot, server, on_hub):
    on_hub.files[WEIGHTS] = weights = os.urandom(4_000_000)
    server.fail(WEIGHTS, Fault(delay=0.1))
    small_parts = "from huggingface_hub import constants\nconstants.DOWNLOAD_CHUNK_SIZE = 65536\n"  # 10 MB otherwise
    code = small_parts + in_a_process(snapshot, "found.fetch()")
    environment = {**os.environ, "HF_HUB_OFFLINE": "0"}
    child = subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not size_of_parts(snapshot) and time.monotonic() < deadline:
        time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    child.wait()
    had = size_of_parts(snapshot)
    assert 0 < had < len(weights)
    assert snapshot.faults() is None
    assert (snapshot.fetch() / WEIGHTS).read_bytes() == weights
    assert server.asked_for(WEIGHTS)[-1].range == f"bytes={had}-"


def size_of_parts(snapshot):
    """Bytes of the weights that the client has written, of a download that is not complete."""
    parts = [*snapshot.folder.glob("*.incomplete"), *snapshot.folder.glob(".incomplete/*")]
    return sum(path.stat().st_size for path in parts if path.is_file() and path.stat().st_size < 4_000_000)


@pytest.mark.parametrize("kind", ["hf"], indirect=True)
def test_a_branch_that_moves_in_a_download_does_not_mix_two_commits(snapshot, server, on_hub, files):
    server.fail(WEIGHTS, *[Fault(corrupt=True)] * 2)
    with pytest.raises(MissingArtifactError):
        snapshot.fetch()
    on_hub.files = {**files, "config.json": files["config.json"] + b"\n"}
    assert files_of(snapshot.fetch()) == on_hub.files


@pytest.mark.parametrize("kind", ["hf"], indirect=True)
def test_the_clients_offline_mode_takes_what_is_here_and_names_what_is_not(snapshot, server, monkeypatch):
    folder = snapshot.fetch()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    server.stop()
    assert snapshot_of(snapshot.repository).fetch() == folder
    with pytest.raises(MissingArtifactError, match="HF_HUB_OFFLINE is set|cannot be reached"):
        snapshot_of(Repository("model", MODEL, "v9", "hf")).check()


@pytest.mark.parametrize("kind", ["hf"], indirect=True)
def test_a_token_is_sent_and_never_shown(snapshot, server, monkeypatch, tmp_path, capsys, caplog):
    monkeypatch.setenv("HF_TOKEN", "hf_planted_token")
    snapshot.fetch()
    server.fail("listing", Fault(status=403))
    with pytest.raises(MissingArtifactError) as fault:
        snapshot_of(Repository("model", MODEL, "v9", "hf")).fetch()
    assert server.tokens == {"Bearer hf_planted_token"}
    written = "".join(path.read_text(errors="replace") for path in tmp_path.rglob("*") if path.is_file())
    assert "hf_planted_token" not in "".join((str(fault.value), *capsys.readouterr(), caplog.text, written))


@pytest.mark.parametrize("kind", ["hf"], indirect=True)
@pytest.mark.parametrize("facts", [{"oid": "../../../evil"}, {"lfs": {"oid": "/evil", "size": 1, "pointerSize": 1}}])
def test_a_hash_that_leads_outside_stops_before_anything_is_written(snapshot, server, on_hub, tmp_path, facts):
    on_hub.listed.append({"type": "file", "path": "a.json", "size": 1, "oid": "0" * 40, **facts})
    with pytest.raises(DataFormatError, match="is not a hash. Nothing was written"):
        snapshot.fetch()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not asked_files(server.requests)


@pytest.mark.parametrize("kind", ["hf"], indirect=True)
def test_other_storage_gets_no_token(snapshot, server, files, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_planted_token")
    with HuggingFaceServer() as storage:
        storage.add_model(MODEL, files)
        server.storage = storage.endpoint
        assert files_of(snapshot.fetch()) == files
        assert WEIGHTS in {request.file for request in storage.requests}
        assert storage.tokens == {None}
    assert server.tokens == {"Bearer hf_planted_token"}


@pytest.mark.parametrize(
    ("text", "hub_of_bare_names", "expected"),
    [
        ("Qwen/A", "ms", "Qwen/A@master"),
        ("Qwen/A@v1", "hf", "hf:Qwen/A@v1"),
        ("Qwen/A", "hf", "hf:Qwen/A@main"),
        ("hf:Qwen/A@refs/pr/1", "ms", "hf:Qwen/A@refs/pr/1"),
        ("ms:Qwen/A", "hf", "Qwen/A@master"),
        ("gh:Qwen/A", "ms", "None"),
        ("hf:Qwen", "ms", "None"),
        ("data/06_models/tiny", "hf", "None"),
    ],
)
def test_a_name_states_its_hub_or_takes_the_configured_one(text, hub_of_bare_names, expected):
    assert str(parse_repository("model", text, hub_of_bare_names)) == expected


@pytest.mark.parametrize("kind", ["hf"], indirect=True)
def test_a_name_that_the_hub_cannot_have_and_an_answer_that_is_no_json_are_one_message(snapshot, server):
    with pytest.raises(MissingArtifactError, match="has no model Qwen/a--b .*Check both names"):
        snapshot_of(Repository("model", "Qwen/a--b", "main", "hf")).check()
    server.fail("listing", Fault(corrupt=True))
    with pytest.raises(MissingArtifactError, match=f"returned an error for hf:{MODEL}@main"):
        snapshot.check()


def test_a_table_is_never_taken_from_the_other_hub():
    assert parse_repository("dataset", "hf:owner/name") is None
