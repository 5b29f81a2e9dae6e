"""Captions and pictures on S3: read by the real client from a server on loopback, and once only."""

from __future__ import annotations

import io
import json
import shutil
import socket
import tarfile
from urllib.request import Request, urlopen

import pytest

from qwen_vl_lora.datasets.sources import CaptionsFileDataset
from qwen_vl_lora.exceptions import MissingArtifactError
from qwen_vl_lora.hub.s3 import Bucket, parse_s3
from qwen_vl_lora.samples.collection import collect
from qwen_vl_lora.samples.places import open_place
from samples.pictures import captions_parameters, image_parameters, jpeg, quarantine_parameters, workspace_folder


@pytest.fixture(scope="module")
def endpoint():
    server = pytest.importorskip("moto.server", reason="pip install 'moto[server]'")
    started = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    started.start()
    host, port = started.get_host_and_port()
    yield f"http://{host}:{port}"
    started.stop()


@pytest.fixture
def put(endpoint, request, tmp_path, monkeypatch):
    """`put({key: bytes})`: store objects in this test's bucket, whose name is `put.bucket`; None removes one."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": endpoint,
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }.items():
        monkeypatch.setenv(name, value)
    bucket = f"bucket-{abs(hash(request.node.name))}"

    def ask(method, key, data=None):
        # Arrow's own upload, in parts, is not understood by moto.
        signed = "AWS4-HMAC-SHA256 Credential=key/20260101/us-east-1/s3/aws4_request"  # moto does not verify it
        headers = {"Content-Type": "x/y", "Authorization": signed}
        urlopen(Request(f"{endpoint}/{bucket}{key}", data, headers, method=method), timeout=20).close()

    def store(objects):
        for key, data in objects.items():
            ask("DELETE" if data is None else "PUT", f"/{key}", data)

    ask("PUT", "")
    store.bucket = bucket
    return store


def gather(source, project, max_share=0.0):
    workspace = workspace_folder(project)
    return collect(source, workspace, captions_parameters(), image_parameters(), quarantine_parameters(max_share))


def texts(collected):
    return [sample["turns"][-1]["text"] for sample in collected.samples]


def csv_of(*rows):
    return "\n".join(["image_path,caption", *(",".join(row) for row in rows)]).encode()


@pytest.mark.parametrize(
    ("place", "parsed"),
    [
        ("s3://my-bucket/a/b.csv", ("my-bucket", "a/b.csv")),
        ("s3:/my-bucket/a/", ("my-bucket", "a")),
        ("s3://my-bucket", ("my-bucket", "")),
        ("s3://B/x", None),
        ("https://my-bucket/x", None),
        ("data/x.csv", None),
    ],
)
def test_a_place_on_s3_is_bucket_and_key(place, parsed):
    assert parse_s3(place) == parsed


def test_a_table_is_read_with_the_pictures_that_it_names(put, tmp_path):
    rows = ("pictures/a.jpg", "a star"), (f"s3://{put.bucket}/else/b.jpg", "a bar"), ("../else/b.jpg", "again")
    put({"set/captions.csv": csv_of(*rows), "set/pictures/a.jpg": jpeg(1), "else/b.jpg": jpeg(2)})
    source = CaptionsFileDataset(filepath=f"s3://{put.bucket}/set/captions.csv").load()
    source.check()
    first = gather(source, tmp_path / "project")
    assert texts(first) == ["a star", "a bar", "again"]
    assert [entry.bytes for entry in first.images] == [len(jpeg(1)), len(jpeg(2))]
    assert first.images.by_sha256(first.samples[0]["images"][0]).suffix == ".jpg"

    put({"set/pictures/a.jpg": None, "else/b.jpg": None})  # a second run reads what it has
    assert list(gather(source, tmp_path / "project").samples) == list(first.samples)


def test_parquet_and_tars_below_a_prefix_are_read(put, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    table, buffer = pa.table({"image": [jpeg(1), jpeg(2)], "caption": ["one", "two"]}), io.BytesIO()
    pq.write_table(table, buffer)
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as packed:
        for name, data in {"0.jpg": jpeg(3), "0.txt": b"three"}.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            packed.addfile(member, io.BytesIO(data))
    put({"parquet/data/train.parquet": buffer.getvalue(), "tars/0.tar": tar.getvalue(), "tars/README.md": b"x"})
    assert texts(gather(open_place(f"s3://{put.bucket}/parquet"), tmp_path / "one")) == ["one", "two"]
    assert texts(gather(open_place(f"s3://{put.bucket}/tars/"), tmp_path / "two")) == ["three"]
    assert texts(gather(open_place(f"s3://{put.bucket}/tars/0.tar"), tmp_path / "three")) == ["three"]


def test_cocos_folder_of_pictures_may_lie_in_the_bucket(put, tmp_path):
    coco = {
        "images": [{"id": 7, "file_name": "a.jpg"}],
        "annotations": [{"id": 1, "image_id": 7, "caption": "a star"}],
    }
    put({"annotations/captions.json": json.dumps(coco).encode(), "train/a.jpg": jpeg(1)})
    entry = {"filepath": f"s3://{put.bucket}/annotations/captions.json", "image_folder": f"s3://{put.bucket}/train"}
    assert texts(gather(CaptionsFileDataset(**entry).load(), tmp_path)) == ["a star"]
    assert texts(gather(CaptionsFileDataset(filepath=[entry]).load(), tmp_path / "several")) == ["a star"]


def test_a_changed_file_is_copied_again_and_an_equal_one_is_not(put, tmp_path, monkeypatch):
    put({"captions.csv": csv_of(("a.jpg", "before")), "a.jpg": jpeg(1)})
    source = open_place(f"s3://{put.bucket}/captions.csv")
    assert texts(gather(source, tmp_path / "project")) == ["before"]
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfileobj", lambda *_: pytest.fail("copied again"))
        assert texts(gather(source, tmp_path / "project")) == ["before"]
    put({"captions.csv": csv_of(("a.jpg", "afterwards"))})
    assert texts(gather(source, tmp_path / "project")) == ["afterwards"]


def test_what_is_not_there_is_named(put, tmp_path):
    rows = (
        ("none.jpg", "lost"),
        ("s3://other-bucket/a.jpg", "elsewhere"),
        ("../../../../etc/passwd", "out"),
        ("a.jpg", "x"),
    )
    put({"captions.csv": csv_of(*rows), "a.jpg": jpeg(1)})
    collected = gather(open_place(f"s3://{put.bucket}/captions.csv"), tmp_path, max_share=0.9)
    assert collected.rejected_samples["reason"].tolist() == ["missing_image", "url_not_allowed", "missing_image"]
    with pytest.raises(
        MissingArtifactError, match=f"Nothing found at s3://{put.bucket}/other.csv. Check bucket and key"
    ):
        open_place(f"s3://{put.bucket}/other.csv").check()
    with pytest.raises(MissingArtifactError, match=r"s3://no-such-bucket/x|Nothing found at s3://no-such-bucket/x"):
        open_place("s3://no-such-bucket/x").check()


def test_a_server_that_is_not_there_is_named_with_the_variables(put, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    with pytest.raises(MissingArtifactError, match=r"cannot be read: .*AWS_ENDPOINT_URL in the environment"):
        open_place(f"s3://{put.bucket}/captions.csv").check()


def test_a_copy_that_breaks_off_leaves_no_file(put, monkeypatch):
    put({"captions.csv": csv_of(("a.jpg", "x"))})
    bucket = Bucket(put.bucket)
    monkeypatch.setattr(shutil, "copyfileobj", lambda *_: (_ for _ in ()).throw(OSError("broken off")))
    with pytest.raises(MissingArtifactError, match="broken off"):
        bucket.bring(bucket.folder / "captions.csv")
    assert list(bucket.folder.iterdir()) == []
