"""Scenes of shapes: their content, random generation and drawing.

Independent of language. All randomness comes from a `random.Random`, so the same seed
gives the same scene on every platform.
"""

from __future__ import annotations

import io
import math
import random
from dataclasses import dataclass
from functools import cache

from PIL import Image, ImageDraw

from qwen_vl_lora.model.families import QWEN2_VL

GRID = 4
"""Cells per side. An object is in one cell, and one image token covers one cell: with objects across several
tokens, a model of this size needs many times as long to learn shapes."""

CELL = QWEN2_VL.token_side
PICTURE_SIDE = GRID * CELL
"""Pixels."""
MAX_JITTER = 2
"""Pixels by which an object's centre may leave the centre of its cell."""

RADIUS_BY_SIZE = {"big": 12, "small": 7}
"""Pixels from centre to outline: a big object at full jitter just fills its cell."""

SUPERSAMPLING = 8

COLOURS = {
    "red": (220, 30, 30),
    "orange": (250, 140, 20),
    "yellow": (250, 230, 50),
    "green": (40, 165, 60),
    "blue": (40, 70, 220),
    "purple": (135, 40, 170),
    "white": (252, 252, 252),
    "black": (15, 15, 15),
}

# No word is both an object's colour and a background, so a text can be parsed without grammar.
BACKGROUNDS = {
    "grey": (150, 150, 150),
    "pink": (250, 190, 205),
    "brown": (120, 80, 45),
    "teal": (0, 125, 130),
}

SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond")
SIZES = tuple(RADIUS_BY_SIZE)
FEWEST_OBJECTS, MOST_OBJECTS = 2, 4


@dataclass(frozen=True, slots=True)
class Thing:
    """The attributes of one object in a caption."""

    size: str
    colour: str
    shape: str


@dataclass(frozen=True, slots=True)
class Placed:
    """A thing in its cell.

    Attributes:
        row, column: cell, counted from the top left, from 0.
        shift: pixels (right, down) from the cell's centre.
    """

    thing: Thing
    row: int
    column: int
    shift: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Scene:
    """A background and two to four different things in reading order (row by row)."""

    background: str
    objects: tuple[Placed, ...]

    @property
    def things(self) -> tuple[Thing, ...]:
        return tuple(placed.thing for placed in self.objects)


def random_scene(rng: random.Random, num_objects: int | None = None) -> Scene:
    """Draw a scene in which size, colour, shape, cell and background are independent and uniform.

    Only repeats are excluded: no two objects share both colour and shape, so that
    "the red circle" always means one of them.
    """
    count = rng.randint(FEWEST_OBJECTS, MOST_OBJECTS) if num_objects is None else num_objects
    cells = sorted(rng.sample(range(GRID * GRID), count))
    kinds = rng.sample([(colour, shape) for colour in COLOURS for shape in SHAPES], count)
    objects = tuple(
        Placed(
            thing=Thing(rng.choice(SIZES), colour, shape),
            row=cell // GRID,
            column=cell % GRID,
            shift=(rng.randint(-MAX_JITTER, MAX_JITTER), rng.randint(-MAX_JITTER, MAX_JITTER)),
        )
        for cell, (colour, shape) in zip(cells, kinds, strict=True)
    )
    return Scene(background=rng.choice(tuple(BACKGROUNDS)), objects=objects)


def draw_picture(scene: Scene) -> Image.Image:
    """Return the scene as an RGB picture of `PICTURE_SIDE` pixels a side."""
    picture = Image.new("RGB", (PICTURE_SIDE, PICTURE_SIDE), BACKGROUNDS[scene.background])
    for placed in scene.objects:
        stencil = _stencil(placed.thing.shape, RADIUS_BY_SIZE[placed.thing.size])
        picture.paste(COLOURS[placed.thing.colour], bounding_box(placed), stencil)
    return picture


def bounding_box(placed: Placed) -> tuple[int, int, int, int]:
    """Return left, top, right and bottom in pixels, the last two exclusive."""
    radius = RADIUS_BY_SIZE[placed.thing.size]
    left = placed.column * CELL + CELL // 2 + placed.shift[0] - radius
    top = placed.row * CELL + CELL // 2 + placed.shift[1] - radius
    return left, top, left + 2 * radius, top + 2 * radius


def encode_png(picture: Image.Image) -> bytes:
    """Return the picture as PNG without time stamps or other metadata."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


@cache
def _stencil(shape: str, radius: int) -> Image.Image:
    """Return the shape's coverage, mode L, `2 * radius` pixels a side, edges smoothed."""
    side = 2 * radius * SUPERSAMPLING
    stencil = Image.new("L", (side, side), 0)
    pen = ImageDraw.Draw(stencil)
    if shape == "circle":
        pen.ellipse((0, 0, side - 1, side - 1), fill=255)
    else:
        pen.polygon([_to_pixel(point, side) for point in _outline(shape)], fill=255)
    return stencil.reduce(SUPERSAMPLING)


def _to_pixel(point: tuple[float, float], side: int) -> tuple[int, int]:
    """Map a point of the unit square [-1, 1]² to whole pixels, the same on every platform."""
    x, y = ((coordinate + 1) / 2 * (side - 1) for coordinate in point)
    return round(x), round(y)


def _outline(shape: str) -> list[tuple[float, float]]:
    """Return a polygon in the unit square [-1, 1]², y pointing down."""
    if shape == "square":
        return [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)]
    if shape == "diamond":
        return [(0, -1), (0.75, 0), (0, 1), (-0.75, 0)]
    if shape == "triangle":
        return [(0, -0.95), (0.98, 0.85), (-0.98, 0.85)]
    if shape == "cross":
        arm = 0.33
        return [
            (-arm, -1), (arm, -1), (arm, -arm), (1, -arm), (1, arm), (arm, arm),
            (arm, 1), (-arm, 1), (-arm, arm), (-1, arm), (-1, -arm), (-arm, -arm),
        ]  # fmt: skip
    return [_star_point(corner) for corner in range(10)]


def _star_point(corner: int) -> tuple[float, float]:
    """Return one of a five-pointed star's ten corners, the topmost first; odd ones lie inside."""
    radius = 1.0 if corner % 2 == 0 else 0.42
    angle = math.pi * corner / 5
    return radius * math.sin(angle), -radius * math.cos(angle)
