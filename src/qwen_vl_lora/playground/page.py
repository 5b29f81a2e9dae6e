"""The page of the playground: fields and buttons around a `Tryout`.

Nothing in it comes from another host: fonts are the system's, and Gradio's own reports are off. What a person gives
or sees is kept in the page's session, so two people do not meet.
"""

from __future__ import annotations

import html
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read at the import

import gradio as gr

from qwen_vl_lora.evaluation.wording import Piece, differing_words
from qwen_vl_lora.parameters import Parameters
from qwen_vl_lora.playground.corrections import Corrections
from qwen_vl_lora.playground.tryout import (
    GENERATION,
    SAMPLING,
    HeldOut,
    Picture,
    Tryout,
    Written,
    check_picture,
    in_words,
)
from qwen_vl_lora.samples.image_stage import MAX_FILE_BYTES

NONE = "none"
_IMAGE = ("resized_height", "resized_width", "min_pixels", "max_pixels")
_WHOLE = {*_IMAGE, "max_new_tokens", "seed"}
_LABELS = {
    **{name: f"{name} (0: not set)" for name in _IMAGE},
    "temperature": "temperature (0: the likeliest word)",
}
_FIELDS = ("user", "system", *_IMAGE, *GENERATION, *SAMPLING)
_SECONDS_BETWEEN_UPDATES = 0.05
_MOST_SHOWN = 48
"""Held-out pictures in the gallery at once."""

_THUMBNAIL = 224
_FOLDER = Path(__file__).parent
_WORST, _BEST = "worst first", "best first"


@dataclass(frozen=True)
class Offer:
    """An adapter to choose.

    Attributes:
        name: as in `Tryout.adapters`.
        label: how good it is, in words.
    """

    name: str
    label: str


@dataclass(frozen=True)
class Playground:
    """What the page shows and does.

    Attributes:
        offers: the adapters, the newest first.
        chosen: the names of one or two of them; empty for the base alone.
        held_out: of an adapter, the worst caption first; empty without an evaluation.
    """

    tryout: Tryout
    offers: Sequence[Offer]
    chosen: Sequence[str]
    corrections: Corrections
    held_out: Callable[[str], Sequence[HeldOut]]

    def build(self) -> gr.Blocks:
        """The page."""
        with gr.Blocks(analytics_enabled=False, title="Playground", fill_width=True, delete_cache=(3600, 3600)) as page:
            state = {"picture": gr.State(None), "asked": gr.State({}), "shown": gr.State([])}
            gr.Markdown(f"# Playground\nBase model: `{self.tryout.base_model.name}`")
            with gr.Row():
                with gr.Column(scale=2, min_width=300):
                    left = self._choices()
                with gr.Column(scale=3, min_width=300):
                    right = self._results()
            gallery = self._gallery()
            self._connect({**state, **left, **right, **gallery})
        return page

    def _choices(self) -> dict[str, Any]:
        offered = [(offer.label, offer.name) for offer in self.offers]
        first, second = [*self.chosen, NONE, NONE][:2]
        upload = gr.Image(
            label="Picture",
            type="filepath",
            sources=["upload"],
            buttons=[],
            height=280,
            elem_id="picture",
            alt_text="The picture",
        )
        upload.preprocess = lambda payload: payload  # whether an upload is a picture is for the project to say
        parts: dict[str, Any] = {
            "upload": upload,
            "first": gr.Dropdown(
                [*offered, ("none: the base alone", NONE)], value=first, label="Adapter", elem_id="first"
            ),
            "second": gr.Dropdown([("none", NONE), *offered], value=second, label="Second adapter", elem_id="second"),
        }
        values = self._trained_fields(first)
        parts["user"] = gr.Textbox(values["user"], label="Prompt", lines=2, elem_id="user")
        parts["go"] = gr.Button("Caption", variant="primary", elem_id="go")
        parts["marks"] = gr.HTML(self._marks(first, second, values), elem_id="marks")
        with gr.Accordion("System text, size and decoding", open=False, elem_id="settings"):
            parts["system"] = gr.Textbox(
                values["system"], label="System text (empty: the chat template's own)", elem_id="system"
            )
            for names in (_IMAGE[:2], _IMAGE[2:], GENERATION, SAMPLING):
                with gr.Row():
                    for name in names:
                        whole = {"precision": 0} if name in _WHOLE else {}
                        label = _LABELS.get(name, name)
                        parts[name] = gr.Number(values[name], label=label, min_width=120, elem_id=name, **whole)
            parts["reset"] = gr.Button("As trained", size="sm", elem_id="reset")
        return parts

    def _results(self) -> dict[str, Any]:
        parts = {
            "fault": gr.HTML("", elem_id="fault"),
            "captions": gr.HTML(_articles([("No caption yet", "Drop, paste or choose a picture.", "")])),
        }
        parts["correction"] = gr.Textbox(label="Caption to save: correct it here", lines=3, elem_id="correction")
        with gr.Row():
            parts["row"] = gr.Button("Save as a training row", elem_id="save-row")
            parts["sidecar"] = gr.Button("Save as a text beside the picture", elem_id="save-sidecar")
        parts["saved"] = gr.HTML("", elem_id="saved")
        parts["command"] = gr.Textbox(
            label="The same on the command line", lines=2, interactive=False, buttons=["copy"], elem_id="command"
        )
        return parts

    def _gallery(self) -> dict[str, Any]:
        with gr.Accordion("Held-out pictures of the adapter's evaluation", open=False) as held_out:
            order = gr.Radio([_WORST, _BEST], value=_WORST, label="Order by CIDEr", elem_id="order")
            gallery = gr.Gallery(
                label="Held-out pictures", columns=6, allow_preview=False, interactive=False, elem_id="gallery"
            )
        return {"held_out": held_out, "order": order, "gallery": gallery}

    def _connect(self, parts: Mapping[str, Any]) -> None:
        """Which part does what."""
        fields = [parts[name] for name in _FIELDS]
        sides = [parts["first"], parts["second"]]
        quick: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": None}
        asking = [parts["picture"], *sides, *fields]
        told = [parts[name] for name in ("captions", "fault", "correction", "command", "asked")]
        latest = {**quick, "trigger_mode": "always_last"}  # what is given meanwhile is not dropped
        write = {"fn": self.write, "inputs": asking, "outputs": told, **latest}
        received = [parts["picture"], parts["fault"], parts["saved"]]
        given = parts["upload"].upload(self.receive, parts["upload"], received, **latest)
        parts["upload"].clear(lambda: None, None, parts["picture"], **quick)
        given.success(**write)
        parts["go"].click(**write)
        switched = parts["first"].change(  # its `input` is sent by leaving it too
            self.switch, [parts["asked"], parts["first"], *fields], [*fields, parts["asked"]], **quick
        )
        switched.then(**write)
        parts["second"].change(**write)
        parts["reset"].click(self._values, parts["first"], fields, **quick)
        changes = [part.change for part in (*sides, *fields)]
        gr.on(changes, self._marks_of, [*sides, *fields], parts["marks"], **latest)
        saving = [parts["picture"], parts["correction"], parts["first"], *fields]
        parts["row"].click(self.save_row, saving, parts["saved"], **quick)
        parts["sidecar"].click(self.save_sidecar, saving, parts["saved"], **quick)
        shown = [parts["gallery"], parts["shown"], parts["fault"]]
        for event in (parts["held_out"].expand, parts["order"].input):
            event(self.browse, [parts["first"], parts["order"]], shown, **quick)
        closed = [parts["held_out"], parts["gallery"], parts["shown"]]
        parts["first"].change(lambda: (gr.Accordion(open=False), [], []), None, closed, **quick)
        picked = parts["gallery"].select(self.pick, parts["shown"], [parts["upload"], *received], **quick)
        picked.success(**write)

    def receive(self, payload: Any) -> tuple[Picture | None, str, str]:
        """Check an upload."""
        if payload is None:
            return None, "", ""
        try:
            data, name = Path(payload.path).read_bytes(), payload.orig_name or Path(payload.path).name
            return check_picture(data, name, self.tryout.settings.image), "", ""
        except Exception as error:
            return None, _fault(error), ""

    def write(self, picture: Picture | None, first: str, second: str, *fields: Any) -> Iterator[tuple[Any, ...]]:
        """Caption the picture with each side, one after the other, and mark the words that differ."""
        if picture is None:
            yield gr.skip(), gr.skip(), gr.skip(), gr.skip(), gr.skip()
            return
        sides = [None, *dict.fromkeys(name for name in (first, second) if name != NONE)]
        texts: dict[str | None, Written] = {}
        try:
            settings = {name: self._asked(name or first, fields) for name in sides}
            last = 0.0
            for name in sides:
                for written in self.tryout.caption(name, picture, settings[name]):
                    texts[name] = written  # the very last is shown together with what follows from it
                    is_due = written.caption is None or name != sides[-1]
                    if is_due and time.monotonic() - last > _SECONDS_BETWEEN_UPDATES:
                        last = time.monotonic()
                        yield _articles(self._shown(sides, texts)), "", gr.skip(), gr.skip(), gr.skip()
        except Exception as error:
            yield _articles(self._shown(sides, texts)), _fault(error), gr.skip(), gr.skip(), gr.skip()
            return
        commands = [self.tryout.command(name, picture, settings[name]) for name in sides]
        best = sides[1] if len(sides) > 1 else None
        yield _articles(self._shown(sides, texts)), "", texts[best].text, "\n".join(commands), gr.skip()

    def switch(self, asked: Mapping[str, Any], name: str, *fields: Any) -> tuple[Any, ...]:
        """Fill the fields with what another adapter was trained with; those that a person changed stay."""
        old = asked or self._trained_fields([*self.chosen, NONE][0])
        new = self._trained_fields(name)
        kept = [new[key] if value == old[key] else value for key, value in zip(_FIELDS, fields, strict=True)]
        return *kept, new

    def save_row(self, picture: Picture | None, caption: str, name: str, *fields: Any) -> str:
        """Save the caption as a training row."""
        return self._save(picture, lambda one: self.corrections.save_row(one, caption, self._asked(name, fields)))

    def save_sidecar(self, picture: Picture | None, caption: str, name: str, *fields: Any) -> str:
        """Save the caption as a text beside the picture."""
        return self._save(picture, lambda one: self.corrections.save_sidecar(one, caption))

    def browse(self, name: str, order: str) -> tuple[Any, Sequence[HeldOut], str]:
        """The held-out pictures of an adapter, small."""
        try:
            found = [] if name == NONE else list(self.held_out(name))
            found = (found if order == _WORST else found[::-1])[:_MOST_SHOWN]
            return [(_thumbnail(one.picture), f"CIDEr {one.score:.2f}") for one in found], found, ""
        except Exception as error:
            return [], [], _fault(error)

    def pick(self, shown: Sequence[HeldOut], event: gr.SelectData) -> tuple[Any, Picture | None, str, str]:
        """Take a held-out picture."""
        try:
            one = shown[int(event.index)]
            references = "".join(f"<br>Reference: {html.escape(text)}" for text in one.references)
            said = f"<p class='saved'>Held out; captions of it are for measuring only.{references}</p>"
            return one.picture.images.open(one.picture.sha256), one.picture, "", said
        except Exception as error:
            return None, None, _fault(error), ""

    def _save(self, picture: Picture | None, save: Callable[[Picture], Path]) -> str:
        if picture is None:
            return "<p class='fault' role='alert'>There is no picture. Drop, paste or choose one.</p>"
        try:
            place = save(picture)
        except Exception as error:
            return _fault(error)
        held_out = " The picture is held out: leave it out of training, or it no longer measures." * picture.is_held_out
        return (
            f"<p class='saved' role='status'>Saved in {html.escape(str(place))}.{held_out} To train on it: "
            f'<code>kedro run --env own_captions --params "captions_file={html.escape(str(self._source_of(place)))}"'
            "</code></p>"
        )

    @staticmethod
    def _source_of(place: Path) -> Path:
        return place.parent if place.suffix == ".txt" else place

    def _asked(self, name: str, fields: Sequence[Any]) -> Parameters:
        values = dict(zip(_FIELDS, fields, strict=True))
        given = {
            "image": {key: values[key] or None for key in _IMAGE},
            "generation": {key: values[key] for key in GENERATION},
            "inference": {"sampling": {key: values[key] for key in SAMPLING}},
        }
        return self.tryout.asked(_adapter(name), values["user"], values["system"] or "", given)

    def _trained_fields(self, name: str) -> dict[str, Any]:
        settings = self.tryout.trained(_adapter(name))
        generation = {key: getattr(settings.generation, key) for key in GENERATION}
        sampling = {key: getattr(settings.inference.sampling, key) for key in SAMPLING}
        prompt = {"user": settings.prompt.user, "system": settings.prompt.system or ""}
        size = {key: value or 0 for key, value in settings.image.size.items()}  # Gradio shows an empty number as 0
        return {**prompt, **{key: size[key] for key in _IMAGE}, **generation, **sampling}

    def _values(self, name: str) -> list[Any]:
        trained = self._trained_fields(name)
        return [trained[key] for key in _FIELDS]

    def _marks_of(self, first: str, second: str, *fields: Any) -> str:
        return self._marks(first, second, dict(zip(_FIELDS, fields, strict=True)))

    def _marks(self, first: str, second: str, values: Mapping[str, Any]) -> str:
        """Whether the fields differ from how each adapter was trained."""
        lines = []
        try:
            for name in dict.fromkeys((first, second)):
                if name == NONE and first != NONE:
                    continue
                asked = self._asked(name, list(values.values()))
                heading = "" if name == NONE else f"{name}: "
                lines += [f"{heading}{text}" for text in self.tryout.differences(_adapter(name), asked)]
        except Exception as error:
            return _fault(error)
        if not lines:
            said = "configured" if first == NONE else "trained"
            return f"<p class='marks' role='status'>✓ Prompt, size and decoding are as {said}.</p>"
        shown = "<br>".join(map(html.escape, lines))
        said = "configuration" if first == NONE else "training"
        return f"<p class='marks differ' role='status'>● Differs from the {said}.<br>{shown}</p>"

    def _shown(
        self, sides: Sequence[str | None], texts: Mapping[str | None, Written]
    ) -> list[tuple[str, str | list[Piece], str]]:
        """Heading, text and a note for each side. Whole captions show the words that differ from the base's."""
        labels = {offer.name: offer.label for offer in self.offers}
        base, tuned = texts.get(None), texts.get(sides[1]) if len(sides) > 1 else None
        articles: list[tuple[str, str | list[Piece], str]] = []
        for name in sides:
            heading = "Base" if name is None else labels[name]
            own, other = texts.get(name), tuned if name is None else base
            if own is None:
                articles.append((heading, "…", ""))
            elif own.caption is None or other is None or other.caption is None:
                articles.append((heading, own.text, _note(own)))
            else:
                articles.append((heading, differing_words(own.text, other.text)[0], _note(own)))
        return articles


def serve_with(page: gr.Blocks) -> Any:
    """An ASGI application of the page."""
    from fastapi import FastAPI

    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    page.queue(default_concurrency_limit=None)
    return gr.mount_gradio_app(
        FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        page,
        path="/",
        footer_links=[],
        run_history=False,
        show_error=True,
        max_file_size=MAX_FILE_BYTES,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=gr.themes.Default(**fonts),
        css_paths=_FOLDER / "page.css",
        head=f"<script>{(_FOLDER / 'page.js').read_text(encoding='utf-8')}</script>",
    )


def _adapter(name: str) -> str | None:
    return None if name == NONE else name


def _fault(error: BaseException) -> str:
    return f"<p class='fault' role='alert'>{html.escape(in_words(error))}</p>"


def _note(written: Written) -> str:
    if written.caption is None:
        return "…"
    return "cut at max_new_tokens" if written.caption.is_cut else ""


def _articles(sides: Sequence[tuple[str, str | list[Piece], str]]) -> str:
    shown = "".join(
        f"<article><h2>{html.escape(heading)}</h2><p>{_marked(text)}</p><small>{html.escape(note)}</small></article>"
        for heading, text, note in sides
    )
    return f"<div class='captions'>{shown}</div>"


def _marked(text: str | list[Piece]) -> str:
    if isinstance(text, str):
        return html.escape(text)
    return "".join(
        f"<mark>{html.escape(piece.text)}</mark>" if piece.differs else html.escape(piece.text) for piece in text
    )


def _thumbnail(picture: Picture) -> Any:
    image = picture.images.open(picture.sha256)
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    return image
