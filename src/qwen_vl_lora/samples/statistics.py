"""Describes captions and pictures before training: numbers, a plot, a contact sheet."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import Image

from qwen_vl_lora.samples.caption_table import captions_in
from qwen_vl_lora.samples.digests import Digests
from qwen_vl_lora.samples.image_store import ImageEntry, ImageStore

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from plotly.graph_objects import Figure

PERCENTILES = (0, 5, 25, 50, 75, 95, 100)
MAX_BARS = 60
SHEET_PICTURES = 48
SHEET_COLUMNS = 8
THUMBNAIL_SIDE = 160
CAPTION_LINES = 3
LINE_HEIGHT = 13
FONT_SIZE = 10
EMPTY = "#e4e1db"
"""Colour of a field whose picture or caption could not be drawn."""


class Description(NamedTuple):
    """The outputs of a description, in the order in which the pipeline names them."""

    statistics: dict[str, Any]
    length_plot: Figure
    sheet: Image.Image


def describe_captions(
    samples: Iterable[Mapping[str, Any]], images: ImageStore, collection_summary: Mapping[str, Any]
) -> Description:
    """Count, plot and show the captions: the samples of one picture and one answer, which may be none.

    Args:
        samples: read once, and never in memory together.
        collection_summary: what was rejected, changed, ignored and suspicious; returned under `collection`.
    """
    import numpy as np

    shown = {entry.sha256 for entry in _evenly_chosen(images)}
    caption_by_sha: dict[str, str] = {}  # the first caption of a picture
    by_picture: Counter[str] = Counter()
    different = Digests()
    words, characters = array("q"), array("q")  # Chinese has no spaces
    for sample, caption in captions_in(samples):
        sha256 = sample["images"][0]
        by_picture[sha256] += 1
        if sha256 in shown:
            caption_by_sha.setdefault(sha256, caption)
        different.add(caption)
        words.append(len(caption.split()))
        characters.append(len(caption))
    lengths = {
        "words": np.frombuffer(words, dtype=np.int64),
        "characters": np.frombuffer(characters, dtype=np.int64),
    }
    return Description(
        statistics={
            "rows": len(words),
            "images": len(images),
            "captions_per_image": _count_captions_per_image(by_picture),
            "duplicate_captions": len(words) - different.num_different,
            **{name: _percentiles(values) for name, values in lengths.items()},
            **_measure_images(images),
            "collection": dict(collection_summary),
        },
        length_plot=plot_lengths(lengths),
        sheet=draw_sheet(caption_by_sha, images),
    )


def plot_lengths(lengths: Mapping[str, npt.NDArray[np.int64]]) -> Figure:
    """Plot the number of captions of each length. Counted here, so that the plot does not grow with the captions."""
    import numpy as np
    from plotly.graph_objects import Bar
    from plotly.subplots import make_subplots

    figure = make_subplots(rows=1, cols=len(lengths), subplot_titles=tuple(lengths))
    for column, values in enumerate(lengths.values(), start=1):
        counts, edges = np.histogram(values, bins=_bin_edges(values))
        figure.add_trace(Bar(x=edges[:-1].tolist(), y=counts.tolist(), showlegend=False), row=1, col=column)
    figure.update_layout(title="Caption length", yaxis_title="captions", bargap=0.05)
    return figure


def draw_sheet(caption_by_sha: Mapping[str, str], images: ImageStore) -> Image.Image:
    """Draw a contact sheet of up to `SHEET_PICTURES` pictures, evenly chosen, with a caption if they have one.

    A picture or caption that cannot be drawn becomes an empty field and one line in the log.
    """
    from qwen_vl_lora.samples.lettering import report_undrawn

    chosen = _evenly_chosen(images)
    num_columns = min(SHEET_COLUMNS, max(len(chosen), 1))
    cell_height = THUMBNAIL_SIDE + CAPTION_LINES * LINE_HEIGHT + 6
    num_rows = max(1, -(-len(chosen) // num_columns))
    sheet = Image.new("RGB", (num_columns * (THUMBNAIL_SIDE + 8), num_rows * cell_height), "white")
    faults: list[Exception] = []
    for number, entry in enumerate(chosen):
        row, column = divmod(number, num_columns)
        corner = (column * (THUMBNAIL_SIDE + 8) + 4, row * cell_height + 4)
        sheet.paste(_draw_picture(entry, images, faults), corner)
        caption = _draw_caption(caption_by_sha.get(entry.sha256, ""), faults)
        sheet.paste(caption, (corner[0], corner[1] + THUMBNAIL_SIDE))
    report_undrawn("contact sheet", faults)
    return sheet


def _evenly_chosen(images: ImageStore) -> list[ImageEntry]:
    import numpy as np

    entries = list(images)
    places = np.linspace(0, len(entries) - 1, min(len(entries), SHEET_PICTURES)).round().astype(int)
    return [entries[place] for place in places]


def _draw_picture(entry: ImageEntry, images: ImageStore, faults: list[Exception]) -> Image.Image:
    from PIL import ImageOps

    try:
        return ImageOps.contain(images.open(entry.sha256), (THUMBNAIL_SIDE, THUMBNAIL_SIDE)).convert("RGB")
    except Exception as error:  # the sheet must not fail the run: what it shows is stored already
        faults.append(error)
        return Image.new("RGB", (THUMBNAIL_SIDE, THUMBNAIL_SIDE), EMPTY)


def _draw_caption(caption: str, faults: list[Exception]) -> Image.Image:
    from PIL import ImageDraw

    from qwen_vl_lora.samples.lettering import choose_lettering, wrap_text

    strip = Image.new("RGB", (THUMBNAIL_SIDE, CAPTION_LINES * LINE_HEIGHT), "white")
    try:
        text, font = choose_lettering(caption, FONT_SIZE)
        draw = ImageDraw.Draw(strip)
        for number, line in enumerate(wrap_text(text, font, THUMBNAIL_SIDE, CAPTION_LINES)):
            draw.text((0, number * LINE_HEIGHT), line, fill="black", font=font)
    except Exception as error:  # as above
        faults.append(error)
        return Image.new("RGB", strip.size, EMPTY)
    return strip


def _count_captions_per_image(by_picture: Mapping[str, int]) -> dict[str, int]:
    images_by_number = Counter(by_picture.values())
    return {str(number): images_by_number[number] for number in sorted(images_by_number)}


def _measure_images(images: ImageStore) -> dict[str, dict[str, float]]:
    import numpy as np

    sizes = np.array([(entry.width, entry.height, entry.bytes) for entry in images], dtype=np.int64).reshape(-1, 3)
    return {name: _percentiles(sizes[:, column]) for column, name in enumerate(("width", "height", "bytes"))}


def _bin_edges(values: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return integer bin edges, at most about MAX_BARS bins."""
    import numpy as np

    lowest, highest = (int(values.min()), int(values.max())) if len(values) else (0, 0)
    width = -(-(highest - lowest + 1) // MAX_BARS)
    return np.arange(lowest, highest + width + 1, width)


def _percentiles(values: npt.NDArray[np.int64]) -> dict[str, float]:
    """Return an empty mapping if there are no values, because JSON has no NaN."""
    import numpy as np

    if not len(values):
        return {}
    return {
        f"p{share}": float(value) for share, value in zip(PERCENTILES, np.percentile(values, PERCENTILES), strict=True)
    }
