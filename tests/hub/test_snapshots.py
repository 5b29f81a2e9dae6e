"""A base model from the hub is whole, verified and then used offline; anything else is one clear message."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from hub.loopback import MODEL, files_of, hub  # noqa: F401
from hub.server import Fault
from qwen_vl_lora.exceptions import BaseModelError, DataFormatError, MissingArtifactError
from qwen_vl_lora.hub.repositories import Repository
from qwen_vl_lora.hub.snapshots import Snapshot

WEIGHTS = "model.safetensors"


@pytest.fixture
def files(base_path):
    return files_of(base_path("qwen2_vl"))


@pytest.fixture
def snapshot(hub, files):  # noqa: F811
    hub.add_model(MODEL, files)
    return Snapshot(Repository("model", MODEL))


def test_a_snapshot_holds_what_the_hub_lists_and_a_manifest_of_it(snapshot, files):
    folder = snapshot.fetch()
    assert files_of(folder) == files
    tree = json.loads(snapshot.manifest.read_text())
    assert (tree["id"], tree["revision"]) == (MODEL, "master")
    assert {file["path"]: file["size"] for file in tree["files"]} == {name: len(data) for name, data in files.items()}


def test_a_verified_snapshot_is_used_without_a_single_request(snapshot, hub):  # noqa: F811
    snapshot.fetch()
    before = len(hub.requests)
    again = Snapshot(snapshot.repository)
    again.check()
    again.fetch()
    assert len(hub.requests) == before


@pytest.mark.parametrize("damage", ["altered", "cut", "missing", "link"])
def test_a_damaged_file_is_named_and_repaired_and_no_other_is_fetched(snapshot, hub, files, damage, caplog):  # noqa: F811
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
    before = len(hub.requests)
    assert any(WEIGHTS in fault for fault in Snapshot(snapshot.repository).faults())
    Snapshot(snapshot.repository).fetch()
    assert WEIGHTS in caplog.text
    assert files_of(snapshot.folder) == files
    assert not weights.is_symlink()
    fetched = {request.file for request in hub.requests[before:] if request.path.endswith("/repo")}
    assert fetched == {WEIGHTS}


def test_a_touched_file_is_hashed_once_and_stays_good(snapshot):
    (snapshot.fetch() / WEIGHTS).touch()
    assert snapshot.faults() == []
    recorded = json.loads(snapshot.manifest.read_text())["files"]
    mtimes = {file["path"]: file["mtime_ns"] for file in recorded}
    assert mtimes[WEIGHTS] == (snapshot.folder / WEIGHTS).stat().st_mtime_ns


def test_a_snapshot_that_was_copied_to_read_only_storage_is_whole(snapshot):
    (snapshot.fetch() / WEIGHTS).touch()  # as a copy without time stamps is
    before = snapshot.manifest.read_bytes()
    code = (
        "from qwen_vl_lora.hub.repositories import Repository\nfrom qwen_vl_lora.hub.snapshots import Snapshot\n"
        f"found = Snapshot(Repository('model', {MODEL!r}))\nassert found.faults() == [], found.faults()\n"
        "found.manifest.with_name('new').touch()"
    )
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


def test_bytes_that_are_broken_on_the_way_are_fetched_again(snapshot, hub, files):  # noqa: F811
    hub.fail(WEIGHTS, Fault(corrupt=True))
    snapshot.fetch()
    assert files_of(snapshot.folder) == files


def test_a_file_that_stays_corrupt_is_named_and_never_becomes_a_snapshot(snapshot, hub):  # noqa: F811
    hub.fail(WEIGHTS, *[Fault(corrupt=True)] * 9)
    with pytest.raises(MissingArtifactError, match=rf"not downloaded whole: {WEIGHTS}: .*Hash mismatch.*same command"):
        snapshot.fetch()
    assert snapshot.faults() is None


def test_errors_of_the_server_are_waited_out_and_then_named(snapshot, hub, files):  # noqa: F811
    hub.fail(WEIGHTS, Fault(status=500))
    snapshot.fetch()
    assert files_of(snapshot.folder) == files
    (snapshot.folder / WEIGHTS).unlink()
    hub.fail(WEIGHTS, *[Fault(status=500)] * 50)
    with pytest.raises(MissingArtifactError, match=f"not downloaded whole: {WEIGHTS}: .*500"):
        snapshot.fetch()
    assert len(hub.asked_for(WEIGHTS)) <= 6


def test_a_listing_that_answers_500_is_one_message_within_seconds(snapshot, hub):  # noqa: F811
    hub.fail("listing", *[Fault(status=500)] * 50)
    with pytest.raises(MissingArtifactError, match=r"answers with an error .*500"):
        snapshot.fetch()


@pytest.mark.parametrize(
    "entry",
    [
        {"Path": "../evil.json", "Type": "blob", "Size": 1},
        {"Path": "/etc/evil.json", "Type": "blob", "Size": 1},
        {"Path": "a/../../evil.json", "Type": "blob", "Size": 1},
        {"Path": "a\\..\\evil.json", "Type": "blob", "Size": 1},
        {"Path": "C:/evil.json", "Type": "blob", "Size": 1},
        {"Path": "evil\n.json", "Type": "blob", "Size": 1},
        {"Path": "evil.json", "Type": "symlink", "Size": 1},
    ],
)
def test_a_name_that_leads_outside_stops_before_anything_is_written(snapshot, hub, tmp_path, entry):  # noqa: F811
    hub.models[MODEL, "master"].listed.append(entry)
    with pytest.raises(DataFormatError, match="Nothing was written"):
        snapshot.fetch()
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert not any(request.path.endswith("/repo") for request in hub.requests)


def test_pickles_and_code_are_not_downloaded(snapshot, hub):  # noqa: F811
    hub.models[MODEL, "master"].files |= {"evil.py": b"1/0", "pytorch_model.bin": b"pickle", "assets/a.png": b"x"}
    folder = snapshot.fetch()
    assert not {"evil.py", "pytorch_model.bin", "assets"} & {path.name for path in folder.iterdir()}


def test_a_model_of_pickles_alone_is_refused_by_name(snapshot, hub, files):  # noqa: F811
    del files[WEIGHTS]
    hub.models[MODEL, "master"].files = files | {"pytorch_model.bin": b"pickle"}
    with pytest.raises(BaseModelError, match=r"pytorch_model\.bin.*are not read"):
        snapshot.fetch()


def test_a_model_that_asks_for_its_own_code_is_refused_before_its_weights_come(snapshot, hub, files):  # noqa: F811
    config = json.loads(files["config.json"]) | {"auto_map": {"AutoModel": "modeling_evil.Evil"}}
    hub.models[MODEL, "master"].files = files | {"config.json": json.dumps(config).encode()}
    with pytest.raises(BaseModelError, match=rf"{MODEL}@master asks for its own code"):
        snapshot.fetch()
    assert hub.asked_for(WEIGHTS) == []


def test_a_missing_revision_is_named(hub, files):  # noqa: F811
    hub.add_model(MODEL, files)
    with pytest.raises(MissingArtifactError, match=rf"has no model {MODEL} at revision v9"):
        Snapshot(Repository("model", MODEL, "v9")).fetch()


def test_without_network_and_snapshot_one_message_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://127.0.0.1:1")  # nobody listens there
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path))
    started = time.monotonic()
    with pytest.raises(MissingArtifactError, match=r"cannot be reached.*Connect once.*base_model=path/to/folder"):
        Snapshot(Repository("model", MODEL)).check()
    assert time.monotonic() - started < 15
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_foreseen(snapshot, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))
    with pytest.raises(MissingArtifactError, match="Make room, or set MODELSCOPE_CACHE"):
        snapshot.fetch()


def test_a_killed_download_goes_on_where_it_was(snapshot, hub, files):  # noqa: F811
    hub.models[MODEL, "master"].files[WEIGHTS] = weights = os.urandom(4_000_000)
    hub.fail(WEIGHTS, Fault(delay=0.1))
    code = (
        "from qwen_vl_lora.hub.repositories import Repository\nfrom qwen_vl_lora.hub.snapshots import Snapshot\n"
        f"Snapshot(Repository('model', {MODEL!r})).fetch()"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    partial = snapshot.folder / f"{WEIGHTS}.incomplete"
    deadline = time.monotonic() + 60
    while not (partial.exists() and partial.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    child.wait()
    had = partial.stat().st_size
    assert 0 < had < len(weights)
    assert snapshot.faults() is None
    assert (snapshot.fetch() / WEIGHTS).read_bytes() == weights
    assert hub.asked_for(WEIGHTS)[-1].range == f"bytes={had}-"
