"""Data sets of both hubs by name: fetched by the real clients from loopback, verified, offline afterwards."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest

from hub.hugging_face import hugging_face  # noqa: F401
from hub.loopback import hub  # noqa: F401
from hub.server import Fault
from qwen_vl_lora.exceptions import DataFormatError, MissingArtifactError
from qwen_vl_lora.hub.data_files import parse_data_place
from qwen_vl_lora.samples.collection import Collected, collect
from qwen_vl_lora.samples.places import open_place
from samples.pictures import captions_parameters, image_parameters, jpeg, quarantine_parameters, workspace_folder

NAME = "owner/captions"
PLACES = {"hf": f"hf:{NAME}", "ms": f"ms:{NAME}"}


@pytest.fixture(params=["hf", "ms"])
def kind(request) -> str:
    return request.param


@pytest.fixture
def server(kind, request):
    return request.getfixturevalue("hugging_face" if kind == "hf" else "hub")


def add(server, files: dict[str, bytes], revision: str | None = None):
    if hasattr(server, "datasets") and hasattr(server, "add"):
        return server.add(NAME, files, revision or "main")
    return server.add_dataset(NAME, files, revision or "master")


def fetched(server) -> list[str]:
    asked = [request.file for request in server.requests if request.file and request.method == "GET"]
    return [file for file in asked if not file.startswith("/api/")]


def gather(place: str, project: Path, **captions) -> Collected:
    return collect(
        open_place(place),
        workspace_folder(project),
        captions_parameters(**captions),
        image_parameters(),
        quarantine_parameters(0.0),
    )


def texts(collected: Collected) -> list[str]:
    return [sample["turns"][-1]["text"] for sample in collected.samples]


def parquet(seeds: range) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {"image": {"bytes": jpeg(seed, (200, 150)), "path": f"{seed:02}.jpg"}, "caption": f"Picture {seed}."}
        for seed in seeds
    ]
    opened = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), opened)
    return opened.getvalue()


def shards(number: int = 3, rows: int = 4) -> dict[str, bytes]:
    return {
        f"data/train-{shard:05}-of-{number:05}.parquet": parquet(range(shard * rows, (shard + 1) * rows))
        for shard in range(number)
    } | {"README.md": b"# Captions\n", ".gitattributes": b"*.parquet filter=lfs\n"}


def folder_of_pictures() -> dict[str, bytes]:
    lines = [{"file_name": f"{seed:02}.jpg", "text": f"Picture {seed}."} for seed in range(6)]
    files = {f"train/{line['file_name']}": jpeg(seed) for seed, line in enumerate(lines)}
    return {"train/metadata.jsonl": "\n".join(map(json.dumps, lines)).encode(), **files}


def tar() -> bytes:
    opened = io.BytesIO()
    with tarfile.open(fileobj=opened, mode="w") as archive:
        for seed in range(3):
            for suffix, data in (("jpg", jpeg(seed)), ("txt", f"Picture {seed}.".encode())):
                member = tarfile.TarInfo(f"{seed:03}.{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return opened.getvalue()


CONTENTS = {
    "parquet": shards(),
    "imagefolder": folder_of_pictures(),
    "webdataset": {"train-000.tar": tar()},
    "json_lines": {
        "captions.jsonl": b'{"image": "pictures/a.jpg", "caption": "Picture 0."}\n',
        "pictures/a.jpg": jpeg(),
    },
    "csv": {"captions.csv": b"image_path,caption\na.jpg,Picture 0.\n", "a.jpg": jpeg()},
    "json": {"captions.json": b'[{"image_path": "a.jpg", "caption": "Picture 0."}]', "a.jpg": jpeg()},
    "sidecars": {"a.jpg": jpeg(), "a.txt": b"Picture 0."},
}
SAMPLES = {"parquet": 12, "imagefolder": 6, "webdataset": 3, "json_lines": 1, "csv": 1, "json": 1, "sidecars": 1}


@pytest.mark.parametrize("content", CONTENTS)
def test_each_content_is_read_whole_and_then_without_a_request(server, kind, tmp_path, content):
    add(server, CONTENTS[content])
    once = gather(PLACES[kind], tmp_path)
    assert texts(once) == [f"Picture {number}." for number in range(SAMPLES[content])]
    asked = len(server.requests)
    again = gather(PLACES[kind], tmp_path)
    assert (again.samples, len(server.requests)) == (once.samples, asked)
    open_place(PLACES[kind]).check()
    assert len(server.requests) == asked


def test_the_first_rows_fetch_only_the_files_that_hold_them(server, kind, tmp_path):
    add(server, shards())
    assert texts(gather(PLACES[kind], tmp_path, num_rows=4)) == [f"Picture {number}." for number in range(4)]
    assert set(fetched(server)) == {"data/train-00000-of-00003.parquet"}


def test_the_first_rows_of_an_imagefolder_fetch_only_their_pictures(server, kind, tmp_path):
    add(server, folder_of_pictures())
    gather(PLACES[kind], tmp_path, num_rows=2)
    assert set(fetched(server)) == {"train/metadata.jsonl", "train/00.jpg", "train/01.jpg"}


def test_a_seeded_sample_reads_all_files(server, kind, tmp_path):
    add(server, shards())
    drawn = gather(PLACES[kind], tmp_path, num_rows=5, sampling="random", seed=3)
    assert len(drawn.samples) == 5
    assert {name for name in fetched(server) if name.endswith(".parquet")} == {
        f"data/train-{number:05}-of-00003.parquet" for number in range(3)
    }


def test_a_file_cut_on_the_way_is_resumed_where_it_ended(server, kind, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 16_000)  # 10 MB: what is less is lost
    name = "data/train-00000-of-00001.parquet"
    files = {name: parquet(range(40))}
    assert len(files[name]) > 100_000
    add(server, files)
    server.fail(name, Fault(cut=70_000))
    assert len(gather(PLACES[kind], tmp_path).samples) == 40
    ranges = [request.range for request in server.requests if request.file == name and request.method == "GET"]
    assert ranges[0] in (None, "bytes=0-")
    resumed = [int(asked.removeprefix("bytes=").partition("-")[0]) for asked in ranges[1:] if asked]
    assert resumed
    assert 0 < resumed[0] <= 70_000


def test_a_wrong_hash_is_fetched_again_and_then_refused(server, kind, tmp_path):
    name = "data/train-00000-of-00003.parquet"
    add(server, shards())
    server.fail(name, Fault(corrupt=True))
    assert len(gather(PLACES[kind], tmp_path, num_rows=4).samples) == 4
    for file in (tmp_path).rglob(name):
        file.write_bytes(b"altered " * 20)
    server.fail(name, *[Fault(corrupt=True)] * 50)
    with pytest.raises(
        MissingArtifactError, match=r"train-00000-of-00003.*(differs from the hub's listing|not downloaded completely)"
    ):
        gather(PLACES[kind], tmp_path, num_rows=4)
    assert not list(tmp_path.rglob(name))


def test_an_altered_file_is_fetched_again(server, kind, tmp_path):
    add(server, CONTENTS["csv"])
    gather(PLACES[kind], tmp_path)
    (file,) = list(tmp_path.rglob("captions.csv"))
    file.write_bytes(file.read_bytes().replace(b"Picture 0", b"Another 0"))
    assert texts(gather(PLACES[kind], tmp_path)) == ["Picture 0."]


@pytest.mark.parametrize("name", ["../evil.csv", "/etc/evil.csv", "a/../../evil.csv", "a\\..\\evil.csv", "C:/evil.csv"])
def test_a_listing_with_a_name_that_leads_outside_is_refused_before_anything_is_written(server, kind, tmp_path, name):
    data = add(server, shards())
    entry = {"type": "file", "path": name, "size": 1, "oid": "0" * 40}
    data.listed.append(entry if kind == "hf" else {"Path": name, "Type": "blob", "Size": 1})
    with pytest.raises(DataFormatError, match="leads outside its folder. Nothing was written"):
        gather(PLACES[kind], tmp_path)
    assert not list(tmp_path.rglob("*.parquet"))


def test_names_in_the_data_never_fetch_or_read_outside_of_it(server, kind, tmp_path):
    (tmp_path.parent / "secret.jpg").write_bytes(jpeg(9))
    add(
        server,
        {"c.csv": b"image_path,caption\n../../../../../secret.jpg,A.\n/etc/passwd,B.\na.jpg,A cat.\n", "a.jpg": jpeg()},
    )
    collected = collect(
        open_place(PLACES[kind]),
        workspace_folder(tmp_path / "project"),
        captions_parameters(),
        image_parameters(),
        quarantine_parameters(),
    )
    assert texts(collected) == ["A cat."]
    assert set(collected.rejected_samples["reason"]) <= {"missing_image", "outside_allowed_roots"}
    assert set(fetched(server)) == {"c.csv", "a.jpg"}


@pytest.mark.parametrize("place", ["hf", "ms"])
def test_without_a_network_the_check_says_so_in_clear_words(place, tmp_path, request, monkeypatch):
    server = request.getfixturevalue("hugging_face" if place == "hf" else "hub")
    monkeypatch.setenv("HF_ENDPOINT" if place == "hf" else "MODELSCOPE_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(MissingArtifactError, match=r"127.0.0.1:9.* cannot be reached"):
        open_place(PLACES[place]).check()
    assert server.requests == []


def test_offline_what_is_here_is_read_and_what_is_not_is_named(hugging_face, tmp_path, monkeypatch):  # noqa: F811
    from huggingface_hub import constants

    hugging_face.add(NAME, shards())
    gather(PLACES["hf"], tmp_path, num_rows=4)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hugging_face.stop()
    open_place(PLACES["hf"]).check()
    assert len(gather(PLACES["hf"], tmp_path, num_rows=4).samples) == 4
    with pytest.raises(MissingArtifactError, match="HF_HUB_OFFLINE is set|cannot be reached"):
        gather(PLACES["hf"], tmp_path)


@pytest.mark.parametrize("missing", ["name", "revision"])
def test_a_name_or_revision_that_is_not_there_is_one_message(server, kind, tmp_path, missing):
    add(server, shards())
    place = f"{kind}:owner/other" if missing == "name" else f"{PLACES[kind]}@v9"
    with pytest.raises(MissingArtifactError, match=r"has no data ?set .* Check both names"):
        open_place(place).check()


def test_a_revision_is_honoured_and_stays_what_it_was(hugging_face, tmp_path):  # noqa: F811
    hugging_face.add(NAME, {"c.csv": b"image_path,caption\na.jpg,Main.\n", "a.jpg": jpeg()})
    other = hugging_face.add(NAME, {"c.csv": b"image_path,caption\na.jpg,Other.\n", "a.jpg": jpeg()}, "refs/pr/1")
    assert texts(gather(f"hf:{NAME}@refs/pr/1", tmp_path)) == ["Other."]
    assert texts(gather(f"hf:{NAME}", tmp_path)) == ["Main."]
    other.files["c.csv"] = b"image_path,caption\na.jpg,Moved.\n"
    assert texts(gather(f"hf:{NAME}@refs/pr/1", tmp_path)) == ["Other."]


def test_splits_of_the_names_are_honoured(server, kind, tmp_path):
    sides = {"train": range(4), "validation": range(4, 6), "test": range(6, 8)}
    add(server, {f"data/{side}-00000-of-00001.parquet": parquet(seeds) for side, seeds in sides.items()})
    collected = gather(PLACES[kind], tmp_path, split_column="split")
    assert {sample["turns"][0]["text"]: sample["split"] for sample in collected.samples} == {
        f"Picture {seed}.": side for side, seeds in sides.items() for seed in seeds
    }


def test_several_tables_are_refused_by_name_and_one_can_be_named(server, kind, tmp_path):
    add(server, {"en/0.parquet": parquet(range(2)), "fr/0.parquet": parquet(range(2, 4))})
    with pytest.raises(DataFormatError, match="several tables in folders of their own: en, fr"):
        open_place(PLACES[kind]).check()
    assert texts(gather(f"{PLACES[kind]}:fr", tmp_path)) == ["Picture 2.", "Picture 3."]
    assert texts(gather(f"{PLACES[kind]}:en/0.parquet", tmp_path)) == ["Picture 0.", "Picture 1."]
    with pytest.raises(MissingArtifactError, match="has no file de"):
        open_place(f"{PLACES[kind]}:de").check()


def test_a_script_is_never_run(server, kind, tmp_path):
    add(server, {"captions.py": b"raise SystemExit('I was run')", "README.md": b"#"})
    with pytest.raises(MissingArtifactError, match=r"captions.py is a script, and scripts are not run"):
        open_place(PLACES[kind]).check()


def test_a_token_is_sent_and_never_shown(hugging_face, tmp_path, monkeypatch, capsys, caplog):  # noqa: F811
    monkeypatch.setenv("HF_TOKEN", "hf_planted_token")
    hugging_face.add(NAME, shards(1))
    gather(PLACES["hf"], tmp_path)
    hugging_face.fail("listing", Fault(status=403))
    with pytest.raises(MissingArtifactError) as fault:
        open_place("hf:owner/private").check()
    assert hugging_face.tokens == {"Bearer hf_planted_token"}
    written = "".join(path.read_text(errors="replace") for path in tmp_path.rglob("*") if path.is_file())
    assert "hf_planted_token" not in "".join((str(fault.value), *capsys.readouterr(), caplog.text, written))


@pytest.mark.parametrize(
    "place", ["hf:owner", "ms:owner/name@", "hf:../name", "hf:owner/name:../../x", "hf:owner/na me"]
)
def test_a_place_that_is_misspelt_is_refused_with_the_right_form(place):
    with pytest.raises(DataFormatError, match="captions_file"):
        parse_data_place(place)


def test_a_hub_data_set_in_the_catalog_needs_the_network_and_is_checked(hugging_face, tmp_path):  # noqa: F811
    from qwen_vl_lora.datasets.sources import CaptionsFileDataset

    hugging_face.add(NAME, shards())
    dataset = CaptionsFileDataset(filepath=PLACES["hf"])
    assert dataset.needs_network()
    dataset.check()
    (tmp_path / "c.csv").write_bytes(b"image_path,caption\na.jpg,A dog.\n")
    assert not CaptionsFileDataset(filepath=str(tmp_path / "c.csv")).needs_network()
    assert not CaptionsFileDataset(filepath=None).needs_network()
