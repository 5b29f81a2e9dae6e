"""URLs in anybody's files: off unless asked for, fetched once, and otherwise pictures like any others."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pandas as pd
import pytest

from hub.picture_server import PictureServer, fetcher
from qwen_vl_lora.exceptions import DataFormatError
from qwen_vl_lora.hub.addresses import address_of_path, path_of_address, replace_addresses
from qwen_vl_lora.preflight import check_files
from qwen_vl_lora.samples.collection import Collected, collect
from qwen_vl_lora.samples.conversations import build_conversations
from qwen_vl_lora.samples.sources import CaptionsFile
from samples.pictures import (
    captions_parameters,
    image_parameters,
    jpeg,
    prompt_parameters,
    quarantine_parameters,
    workspace_folder,
    write,
)

NAMES = ["0.jpg", "1.jpg", "0.jpg"]


@pytest.fixture
def server():
    with PictureServer() as running:
        for seed in range(2):
            running.answers[f"/{seed}.jpg"] = lambda request, seed=seed: request.give(jpeg(seed))
        yield running


def write_forms(folder: Path, references: list[str]) -> list[Path]:
    """The same captions as CSV, the tutorials' JSON, LLaVA's JSON, ms-swift's and OpenAI's JSON Lines."""
    pairs = [(reference, f"Caption {number}.") for number, reference in enumerate(references)]
    pd.DataFrame(pairs, columns=["image_path", "caption"]).to_csv(folder / "c.csv", index=False)

    def turns(question):
        return lambda text: [{"from": "user", "value": question}, {"from": "gpt", "value": text}]

    tutorial = [
        {"conversations": turns(f"COCO Yes: <|vision_start|>{reference}<|vision_end|>")(text)}
        for reference, text in pairs
    ]
    llava = [{"image": reference, "conversations": turns("<image>")(text)} for reference, text in pairs]
    swift = [
        {"images": [{"path": reference}], "messages": [{"role": "assistant", "content": text}]}
        for reference, text in pairs
    ]
    openai = [
        {
            "messages": [
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": reference}}]},
                {"role": "assistant", "content": text},
            ]
        }
        for reference, text in pairs
    ]
    write(folder / "tutorial.json", json.dumps(tutorial).encode())
    write(folder / "llava.json", json.dumps(llava).encode())
    write(folder / "swift.jsonl", "\n".join(map(json.dumps, swift)).encode())
    write(folder / "openai.jsonl", "\n".join(map(json.dumps, openai)).encode())
    return [folder / name for name in ("c.csv", "tutorial.json", "llava.json", "swift.jsonl", "openai.jsonl")]


def run(file: Path, project: Path, fetch=None, **image) -> Collected:
    return collect(
        CaptionsFile(file),
        workspace_folder(project),
        captions_parameters(),
        image_parameters(**image),
        quarantine_parameters(1.0),
        fetch,
    )


def refusal(file: Path, project: Path, fetch=None, **image) -> str:
    """The message of a run none of whose rows is good; it names each row's reason."""
    with pytest.raises(DataFormatError, match="at least one row must be good") as caught:
        run(file, project, fetch, **image)
    return str(caught.value)


def test_urls_in_every_form_give_what_files_give(server, tmp_path):
    for seed in range(2):
        write(tmp_path / "local" / f"{seed}.jpg", jpeg(seed))
    expected = run(write_forms(tmp_path / "local", NAMES)[0], tmp_path)
    (tmp_path / "remote").mkdir()
    for file in write_forms(tmp_path / "remote", [server.url(f"/{name}") for name in NAMES]):
        collected = run(file, tmp_path, fetcher(server).fetch, allow_urls=True)
        assert list(collected.rejected_samples["detail"]) == []
        assert build_conversations(collected.samples, collected.images, prompt_parameters()) == build_conversations(
            expected.samples, expected.images, prompt_parameters()
        )


def test_a_picture_is_fetched_once_whatever_the_rows_and_runs(server, tmp_path):
    file = write(
        tmp_path / "c.csv", "\n".join(["image_path,caption", *[f"{server.url('/0.jpg')},A dog."] * 20]).encode()
    )
    for _ in range(2):  # the second run finds the bytes of the first, which was never published
        assert len(run(file, tmp_path, fetcher(server).fetch, allow_urls=True).samples) == 20
    assert server.asked == ["pictures.example/0.jpg"]


def test_what_was_fetched_and_altered_since_is_fetched_again(server, tmp_path):
    file = write(tmp_path / "c.csv", f"image_path,caption\n{server.url('/0.jpg')},A dog.\n".encode())
    first = run(file, tmp_path, fetcher(server).fetch, allow_urls=True)
    (entry,) = first.images
    first.images.file(entry.sha256).write_bytes(jpeg(9))
    again = run(file, tmp_path, fetcher(server).fetch, allow_urls=True)
    assert [entry.sha256] == [entry.sha256 for entry in again.images]
    assert len(server.asked) == 2


def test_urls_are_off_unless_asked_for(server, tmp_path):
    files = write_forms(tmp_path, [server.url("/0.jpg")])
    for file in files:
        assert "By reason: url_not_allowed 1." in refusal(file, tmp_path, fetcher(server).fetch)
    assert server.asked == []


def test_a_path_that_only_looks_like_our_own_form_of_a_url_is_not_fetched_either(server, tmp_path):
    file = write(tmp_path / "c.csv", f"image_path,caption\n{path_of_address(server.url('/0.jpg'))},A.\n".encode())
    assert "url_not_allowed: https://pictures.example" in (message := refusal(file, tmp_path))
    assert "set image.allow_urls: true" in message


@pytest.mark.parametrize(
    ("host", "said"),
    [
        ("127.0.0.1", "is 127.0.0.1, which is no address of the internet"),
        ("localhost", "which is no address of the internet"),
        ("[::1]", "is ::1, which is no address of the internet"),
        ("2130706433", "is 127.0.0.1, which is no address of the internet"),
        ("elsewhere.example", "may not be asked"),
    ],
)
def test_the_rules_of_the_parameters_hold_without_any_help(tmp_path, host, said):
    file = write(tmp_path / "c.csv", f"image_path,caption\nhttps://{host}/a.jpg,A dog.\n".encode())
    hosts = ["127.0.0.1", "localhost", "::1", "2130706433"]
    message = refusal(file, tmp_path, allow_urls=True, url_hosts=hosts, url_timeout=5.0, url_max_bytes=10**6)
    assert "By reason: url_not_allowed 1." in message
    assert said in message


def test_each_way_of_failing_is_its_rows_reason_and_the_others_go_on(server, tmp_path):
    server.answers["/html.jpg"] = lambda request: request.give(b"<html>not found</html>")
    server.answers["/no.jpg"] = lambda request: request.give(b"", 404)
    names = ["/0.jpg", "/html.jpg", "/no.jpg", "/1.jpg"]
    lines = [f"{server.url(name)},Caption." for name in names]
    lines.append("https://elsewhere.example/a.jpg,Caption.")
    file = write(tmp_path / "c.csv", "\n".join(["image_path,caption", *lines]).encode())
    collected = run(file, tmp_path, fetcher(server).fetch, allow_urls=True)
    assert len(collected.samples) == 2
    found = list(zip(collected.rejected_samples["row"], collected.rejected_samples["reason"], strict=True))
    assert found == [(2, "not_an_image"), (3, "missing_image"), (5, "url_not_allowed")]
    assert all("https://" in detail and "/url:/" not in detail for detail in collected.rejected_samples["detail"])


def test_a_row_whose_address_is_in_any_script_or_in_latin_1_is_good_or_bad_alone(server, tmp_path):
    server.answers["/%E5%9B%BE%E7%89%87/0.jpg"] = lambda request: request.give(jpeg(0))
    lines = [
        f"{server.url(path)},Caption.".encode(coding)
        for path, coding in (("/图片/0.jpg", "utf-8"), ("/é.jpg", "latin-1"))
    ]
    file = write(tmp_path / "c.csv", b"\n".join([b"image_path,caption", *lines]))
    check_files(CaptionsFile(file).with_addresses(), captions_parameters(), quarantine_parameters(0.5))
    collected = run(file, tmp_path, fetcher(server).fetch, allow_urls=True)
    assert len(collected.samples) == 1
    assert list(collected.rejected_samples["reason"]) == ["bad_encoding"]


def test_a_picture_above_the_limit_is_rejected(server, tmp_path):
    file = write(tmp_path / "c.csv", f"image_path,caption\n{server.url('/0.jpg')},A dog.\n".encode())
    fetch = fetcher(server, max_bytes=100).fetch
    assert "By reason: file_too_large 1." in refusal(file, tmp_path, fetch, allow_urls=True)


@pytest.mark.parametrize("address", ["https://a.example/b%20c.jpg?x=1&y=/../#f", "http://a.example:8080/ü"])
def test_a_path_turns_back_into_its_address(address):
    path = path_of_address(address)
    assert len(path.parts) == 3
    assert address_of_path(str(path)) == address


def test_a_text_that_mentions_an_address_stays_as_it_is():
    record = {"id": "https://a.example/", "conversations": [{"value": "https://a.example/b.jpg"}]}
    assert replace_addresses(record, re.compile("<(.*?)>")) == record


def test_a_record_nested_without_end_stays_as_it_is():
    record: list = []
    for _ in range(5000):
        record = [record]
    assert replace_addresses(record, re.compile("<(.*?)>")) is not None
