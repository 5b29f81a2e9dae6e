"""A table on the hub becomes samples through the real client, in a process of its own as users have it."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from kedro.io import AbstractDataset, DatasetError

import warm
from hub.loopback import COCO, add_coco, hub  # noqa: F401
from hub.server import Fault
from qwen_vl_lora.exceptions import DataFormatError, MissingArtifactError
from samples.pictures import jpeg, write

ENTRY = {
    "type": "qwen_vl_lora.datasets.hub.HubCaptionsDataset",
    "dataset": f"{COCO}@master",
    "subset": "coco_2014_caption",
    "split": "train",
    "columns": {"id": "image_id", "caption": "caption", "image": "image"},
    "trust_remote_code": True,
}
COLLECT = Path(__file__).parents[1] / "collecting.py"


def dataset(**changes) -> AbstractDataset:
    return AbstractDataset.from_config("captioned_images", ENTRY | changes)


@pytest.fixture
def collect_each():
    """`collect_each([folder, entry, captions, image], …)`: what the pipeline's node makes of each, in one process."""

    def go(*orders):
        given = json.dumps([[str(folder), *order] for folder, *order in orders])
        child = warm.run([sys.executable, COLLECT, given], cwd=COLLECT.parent)
        assert child.returncode == 0, child.stderr[-3000:]
        results = [json.loads(line) for line in child.stdout.splitlines() if line.startswith("[[")]
        assert len(results) == len(orders)
        names = ("samples", "rejected", "conversations", "split")
        return [dict(zip(names, result, strict=True)) for result in results]

    return go


@pytest.fixture
def collected(tmp_path, collect_each):
    """`collected(captions={"num_rows": 3})`: what the pipeline's node makes of the table."""

    def go(captions=None, image=None, entry=ENTRY):
        return collect_each([tmp_path / "project", entry, captions or {}, image or {}])[0]

    return go


def pictures_asked_for(server) -> list[str]:
    return [request.file for request in server.requests if request.path.startswith("/storage/")]


def test_rows_become_captions_and_bad_ones_are_rejected_with_their_reason(hub, collected):  # noqa: F811
    add_coco(hub, [jpeg(seed) for seed in range(8)])
    names = list(hub.storage)
    del hub.storage[names[1]]
    hub.storage[names[2]] = b"<html>gone</html>"
    hub.fail(names[3], Fault(status=500))
    hub.fail(names[4], *[Fault(status=500)] * 9)
    hub.fail(names[5], Fault(cut=100))
    hub.fail(names[6], *[Fault(delay=4.0)] * 3)
    result = collected(image={"url_timeout": 2.0})
    assert [sample["id"] for sample in result["samples"]] == [f"COCO_{number:012}" for number in (0, 3, 5, 7)]
    assert result["samples"][0]["turns"] == [{"role": "assistant", "text": "A picture, number 0."}]
    found = {row["row"]: (row["reason"], row["detail"]) for row in result["rejected"]}
    assert {row: reason for row, (reason, _) in found.items()} == {
        2: "missing_image",
        3: "not_an_image",
        5: "missing_image",
        7: "missing_image",
    }
    assert "404" in found[2][1]
    assert "after 3 attempts" in found[5][1]
    # An interrupted or repeated run asks again for what it did not get, and for nothing else.
    before = len(hub.requests)
    hub.faults.clear()
    assert len(collected(image={"url_timeout": 2.0})["samples"]) == 6
    again = [request.file for request in hub.requests[before:] if request.path.startswith("/storage/")]
    assert sorted(set(again)) == sorted(names[number] for number in (1, 2, 4, 6))


def test_the_hub_gives_the_same_conversations_and_split_as_a_table_of_files(hub, collected, tmp_path):  # noqa: F811
    pictures = [jpeg(seed) for seed in (0, 1, 2, 0, 3)]
    add_coco(hub, pictures)
    lines = ["image_path,caption"]
    for number, picture in enumerate(pictures):
        write(tmp_path / "mine" / f"{number}.jpg", picture)
        lines.append(f'{number}.jpg," A picture,  number {number}."')
    table = write(tmp_path / "mine" / "captions.csv", "\n".join(lines).encode())
    local = {"type": "qwen_vl_lora.datasets.sources.CaptionsFileDataset", "filepath": str(table)}
    from_hub, from_table = collected(), collected(entry=local)
    assert len(from_hub["conversations"]) == 5
    assert from_hub["conversations"] == from_table["conversations"]
    assert from_hub["split"] == from_table["split"]


def test_only_the_pictures_of_rows_that_are_taken_are_fetched(hub, collect_each, tmp_path):  # noqa: F811
    add_coco(hub, [jpeg(seed) for seed in range(12)])
    orders = [{"num_rows": 3}, {"num_rows": 3, "sampling": "random", "seed": 1}]
    results = collect_each(*([tmp_path / str(number), ENTRY, order, {}] for number, order in enumerate(orders)))
    first, drawn = ([sample["id"] for sample in result["samples"]] for result in results)
    assert first == [f"COCO_{number:012}" for number in (0, 1, 2)]
    assert len(drawn) == 3
    assert drawn != first
    assert sorted(pictures_asked_for(hub)) == sorted(f"train2014/{image_id}.jpg" for image_id in first + drawn)


def test_a_file_of_the_table_that_arrives_wrong_is_fetched_again(hub, collect_each, tmp_path):  # noqa: F811
    faults = {"refused": Fault(status=500), "corrupt": Fault(corrupt=True), "cut": Fault(cut=50)}
    orders = []
    for name, fault in faults.items():
        add_coco(hub, [jpeg(seed) for seed in range(4)], dataset=f"some/{name}", table=f"{name}.csv")
        hub.fail(f"{name}.csv", fault)
        orders.append([tmp_path / name, ENTRY | {"dataset": f"some/{name}@master"}, {}, {}])
    for name, result in zip(faults, collect_each(*orders), strict=True):
        assert len(result["samples"]) == 4
        assert len(hub.asked_for(f"{name}.csv")) == 2


def half_of_the_table(cache):
    """The file of the table while it arrives; the dataset's other files are small."""
    for path in cache.rglob("*.incomplete"):
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_size > 10_000:
                return path
    return None


def test_a_killed_download_of_the_tables_file_goes_on_where_it_was(hub, tmp_path, collected):  # noqa: F811
    add_coco(hub, [jpeg(seed) for seed in range(40)], [f"{number} {'x' * 30_000}" for number in range(40)])
    hub.fail("train.csv", Fault(delay=0.2))
    arguments = json.dumps([[str(tmp_path / "project"), ENTRY, {}, {}]])
    child = warm.start([sys.executable, COLLECT, arguments], cwd=COLLECT.parent, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while (partial := half_of_the_table(tmp_path / "cache")) is None:
        assert child.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    child.wait()
    had = partial.stat().st_size
    assert 0 < had < len(hub.datasets[COCO, "master"].files["train.csv"])
    assert len(collected()["samples"]) == 40
    assert [request.range for request in hub.asked_for("train.csv")] == [None, f"bytes={had}-"]


def test_a_file_of_the_table_that_stays_wrong_is_named_and_the_next_run_mends_it(hub, collected):  # noqa: F811
    add_coco(hub, [jpeg(seed) for seed in range(4)])
    hub.fail("train.csv", *[Fault(status=500)] * 2)
    with pytest.raises(AssertionError, match=r"train\.csv of the dataset .* differ from the hub's listing"):
        collected()
    assert len(collected()["samples"]) == 4


def test_a_script_without_consent_is_refused_and_never_runs(hub, tmp_path):  # noqa: F811
    add_coco(hub, [jpeg()])
    hub.datasets[COCO, "master"].files["coco_2014_caption.py"] = f"open({str(tmp_path / 'ran')!r}, 'w')".encode()
    rows = dataset(trust_remote_code=False).load()
    with pytest.raises(DataFormatError, match=r"is a Python script.*set trust_remote_code: true.*Nothing was run"):
        next(iter(rows))
    assert not (tmp_path / "ran").exists()
    assert hub.asked_for("coco_2014_caption.py") == []


def test_consent_of_an_earlier_run_does_not_count_for_this_one(hub, collected):  # noqa: F811
    add_coco(hub, [jpeg()])
    collected()
    with pytest.raises(DataFormatError, match="set trust_remote_code: true"):
        next(iter(dataset(trust_remote_code=False).load()))


def test_a_listing_with_a_name_that_leads_outside_stops_before_anything_is_written(hub, tmp_path):  # noqa: F811
    add_coco(hub, [jpeg()])
    hub.datasets[COCO, "master"].listed.append({"Path": "../evil.csv", "Type": "blob", "Size": 1, "Sha256": ""})
    with pytest.raises(DataFormatError, match=r"'\.\./evil\.csv'.*Nothing was written"):
        next(iter(dataset().load()))
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_a_missing_revision_is_named(hub):  # noqa: F811
    add_coco(hub, [jpeg()])
    with pytest.raises(MissingArtifactError, match=f"has no dataset {COCO} at revision v9"):
        next(iter(dataset(dataset=f"{COCO}@v9").load()))


def test_without_network_one_message_names_the_official_files(monkeypatch, tmp_path):
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path))
    started = time.monotonic()
    with pytest.raises(MissingArtifactError, match=r"cannot be reached.*official COCO files"):
        dataset().check()
    assert time.monotonic() - started < 15


def test_a_plain_csv_on_the_hub_is_a_table_too_and_needs_no_consent(hub, collected):  # noqa: F811
    lines = [f"i{seed},Caption {seed}.,{hub.endpoint}/storage/{seed}.jpg" for seed in range(4)]
    hub.storage |= {f"{seed}.jpg": jpeg(seed) for seed in range(4)}
    hub.add_dataset("some/rows", {"train.csv": "\n".join(["id,caption,image", *lines]).encode()})
    columns = {"id": "id", "caption": "caption", "image": "image"}
    entry = ENTRY | {"dataset": "some/rows", "subset": None, "columns": columns, "trust_remote_code": False}
    assert [sample["id"] for sample in collected(entry=entry)["samples"]] == ["i0", "i1", "i2", "i3"]


def test_a_dataset_without_a_table_is_named(hub, collected):  # noqa: F811
    hub.add_dataset("some/pictures", {"README.md": b"# Nothing\n"})
    entry = ENTRY | {"dataset": "some/pictures", "subset": None, "trust_remote_code": False}
    with pytest.raises(AssertionError, match=r"some/pictures@master lacks required files: .*data files"):
        collected(entry=entry)


@pytest.mark.parametrize("name", [COCO, COCO.rpartition("/")[2]])
def test_a_local_folder_of_the_datasets_name_is_not_taken_for_it(hub, tmp_path, monkeypatch, name):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir(parents=True)  # the tutorial itself leaves one
    with pytest.raises(DataFormatError, match=rf"{name} exists, .* in place of the dataset {COCO}@master\. Rename it"):
        dataset().check()
    assert hub.requests == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "coco"}, "must read owner/name"),
        ({"dataset": "../x/y"}, "must read owner/name"),
        ({"columns": {"id": "a"}}, "id, caption and image are required"),
    ],
)
def test_an_entry_that_cannot_be_meant_is_refused(changes, message):
    with pytest.raises(DatasetError, match=message):
        dataset(**changes)


def test_describing_a_table_asks_nobody():
    source = dataset()
    assert source.exists()
    assert COCO in str(source)
