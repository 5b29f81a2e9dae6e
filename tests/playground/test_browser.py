"""The playground as a person meets it: opened by its command, used in Chromium."""

from __future__ import annotations

import base64
import json
import os
import time
from urllib.parse import urlsplit

import pytest

from playground.conftest import playground_server
from qwen_vl_lora.samples.places import open_place
from samples.pictures import jpeg
from viz.browser import findings_of_axe, needs_chromium, open_page

pytest.importorskip("gradio")
pytest.importorskip("websockets")
pytestmark = [needs_chromium, pytest.mark.slow]

DROP = """(() => {{
  const bytes = Uint8Array.from(atob("{data}"), one => one.charCodeAt(0));
  const moved = new DataTransfer();
  moved.items.add(new File([bytes], "{name}", {{type: "image/jpeg"}}));
  const target = {target};
  target.dispatchEvent(new {event});
}})()"""
UPLOADER = 'document.querySelector("#picture button, #picture [role=button]")'
READY = f'Boolean({UPLOADER}) && Boolean(document.querySelector("#marks .marks"))'
CAPTIONS = '[...document.querySelectorAll(".captions article p")].map(one => one.innerText)'
NOTES = '[...document.querySelectorAll(".captions article small")].map(one => one.innerText)'
IS_DONE = f'{NOTES}.every(one => one != "…") && {CAPTIONS}.every(one => one != "…") && {CAPTIONS}'
MARKS = '(document.querySelector("#marks .marks")?.innerText ?? "")'
FAULT = '(document.querySelector("#fault .fault")?.innerText ?? "")'
SAVED = '(document.querySelector("#saved")?.innerText ?? "")'


def drop(page, data, name="my photo.jpg"):
    event = 'DragEvent("drop", {dataTransfer: moved, bubbles: true, cancelable: true})'
    page.js(DROP.format(data=base64.b64encode(data).decode(), name=name, target=UPLOADER, event=event))


def paste(page, data, name="pasted.jpg"):
    event = 'ClipboardEvent("paste", {clipboardData: moved, bubbles: true, cancelable: true})'
    page.js(DROP.format(data=base64.b64encode(data).decode(), name=name, target="document.body", event=event))


def field(page, name):
    return page.js(f'document.querySelector("#{name} textarea, #{name} input").value')


def write_into(page, name, text):
    page.js(f'document.querySelector("#{name} textarea, #{name} input").focus()')
    page.js(f'document.querySelector("#{name} textarea, #{name} input").select()')
    page.type(text)


def click(page, name):
    page.js(f'(document.querySelector("#{name} button") ?? document.querySelector("#{name}")).click()')


def choose(page, name, label):
    """Choose an entry of a dropdown by keyboard, as its first letters say."""
    page.js(f'document.querySelector("#{name} input").focus()')
    page.js(f'document.querySelector("#{name} input").select()')
    page.type(label)
    page.wait_for(f'[...document.querySelectorAll("#{name} [role=option], ul[role=listbox] li")].length > 0', 20)
    page.press("Enter", 13, "\r")


def test_a_photo_is_dropped_captioned_and_its_caption_saved(project, tmp_path):
    """Drop two, captions of the second, switch, other prompt and its mark, correct, save, copy."""
    began = time.monotonic()
    with playground_server(project, "--save-to", str(tmp_path / "saved")) as url, open_page(tmp_path / "b") as page:
        page.open(url)
        page.wait_for(READY)
        drop(page, jpeg(3), "replaced at once.jpg")
        page.wait_for('Boolean(document.querySelector("#picture img"))')
        drop(page, jpeg(1, (90, 60)))
        page.wait_for('document.querySelector("#command textarea").value.includes("my photo.jpg")')
        base, tuned = page.wait_for(f"{CAPTIONS}.length == 2 && {IS_DONE}")
        print("first caption after", time.monotonic() - began, "s; log:", (project / "playground.log").read_text())
        assert tuned
        assert "as trained" in page.js(MARKS)

        choose(page, "first", "tiny, CIDEr")
        page.wait_for(f"{CAPTIONS}.length == 2 && {IS_DONE} && {CAPTIONS}[1] != {json.dumps(tuned)}")
        assert page.js(CAPTIONS)[0] == base

        write_into(page, "user", "Which shapes?")
        page.wait_for(f"{MARKS}.includes(\"now 'Which shapes?'\")")
        click(page, "go")
        page.wait_for(
            f'document.querySelector("#command textarea").value.includes("--prompt \'Which shapes?\'") && {IS_DONE}'
        )

        time.sleep(1)  # Gradio sends the last values of a stream twice
        write_into(page, "correction", "A corrected caption.")
        click(page, "save-row")
        page.wait_for(f'{SAVED}.includes("captions.jsonl")')
        (row,) = open_place(str(tmp_path / "saved/rows/captions.jsonl"))
        assert [turn.text for turn in row.turns] == ["<image>Which shapes?", "A corrected caption."]
        click(page, "save-sidecar")
        page.wait_for(f'{SAVED}.includes(".txt")')
        assert len(list((tmp_path / "saved/sidecars").iterdir())) == 2

        paste(page, b"<html>no picture</html>", "${1+1}{{2}}<img src=x>.jpg")
        page.wait_for(f'{FAULT}.includes("not_an_image")')
        paste(page, jpeg(2, (60, 90)))
        page.wait_for(
            f'{FAULT} == "" && {IS_DONE} && document.querySelector("#command textarea").value.includes("pasted.jpg")'
        )

        assert page.errors == []
        assert {urlsplit(one).hostname for one in page.requests if not one.startswith(("data:", "blob:"))} == {
            "127.0.0.1"
        }


def test_keyboard_alone_is_enough_on_a_desk_and_a_phone_light_and_dark(project, tmp_path):
    """A file is chosen, captioned and its caption saved without a mouse; nothing is wider than the screen."""
    photo = tmp_path / "photo.jpg"
    photo.write_bytes(jpeg(3, (80, 80)))
    with playground_server(project, "--save-to", str(tmp_path / "saved")) as url, open_page(tmp_path / "b") as page:
        page.intercept_choosers()
        for width, scheme in ((1440, "light"), (1440, "dark"), (390, "light"), (390, "dark")):
            page.prefer(scheme)
            page.open(url, width=width)
            page.wait_for(READY)
            tab_to(page, "picture")
            page.press("Enter", 13, "\r")
            page.choose_file(photo)
            page.wait_for(f"{CAPTIONS}.length == 2 && {IS_DONE}")
            time.sleep(1)  # Gradio sends the last values of a stream twice
            tab_to(page, "correction")
            page.type(f" by {width} {scheme}")
            tab_to(page, "save-row")
            page.press("Enter", 13, "\r")
            page.wait_for(f'{SAVED}.includes("captions.jsonl")')
            (row,) = open_place(str(tmp_path / "saved/rows/captions.jsonl"))
            assert row.turns[-1].text.endswith(f"by {width} {scheme}")
            assert page.js("document.documentElement.scrollWidth <= innerWidth")
            assert page.js('matchMedia("(prefers-color-scheme: dark)").matches') == (scheme == "dark")
            assert page.errors == []
            page.open("about:blank")
            page.wait_for("location.href == 'about:blank'")
            page.errors.clear()  # of the streams that leaving the page ends


@pytest.mark.skipif("AXE_CORE" not in os.environ, reason="AXE_CORE names no axe.min.js (from `npm pack axe-core`)")
def test_axe_finds_nothing(project, tmp_path):
    with playground_server(project) as url, open_page(tmp_path / "b") as page:
        assert findings_of_axe(page, url, READY) == []


def tab_to(page, name):
    """Press Tab until the focus is in the part of this name."""
    for _ in range(60):
        if page.js(f'Boolean(document.activeElement.closest("#{name}"))'):
            return
        page.press("Tab", 9)
    raise AssertionError(f"{name} is not reached by Tab")
