"""Scenes and pictures follow from the seed, and pictures show what the scene holds."""

from __future__ import annotations

import io
import random

import pytest
from PIL import Image

from qwen_vl_lora.tiny.drawing import (
    BACKGROUNDS,
    CELL,
    COLOURS,
    MAX_JITTER,
    PICTURE_SIDE,
    RADIUS_BY_SIZE,
    SHAPES,
    Placed,
    Scene,
    Thing,
    draw_picture,
    encode_png,
    random_scene,
)


def scene_of(*objects: Placed, background: str = "grey") -> Scene:
    return Scene(background=background, objects=objects)


def centred(size: str, colour: str, shape: str) -> Placed:
    return Placed(Thing(size, colour, shape), row=1, column=1, shift=(0, 0))


def random_scenes(count: int) -> list[Scene]:
    rng = random.Random(7)
    return [random_scene(rng) for _ in range(count)]


def test_same_seed_draws_same_scene_and_same_bytes() -> None:
    first, second = (random_scene(random.Random(3)) for _ in range(2))
    assert first == second
    assert encode_png(draw_picture(first)) == encode_png(draw_picture(second))


def test_a_seed_gives_this_scene_on_every_platform() -> None:
    # Written down from Python 3.11 on Linux: other draws would be another data set, and another base.
    assert random_scene(random.Random(0)) == Scene(
        background="brown",
        objects=(
            Placed(Thing("small", "purple", "triangle"), row=0, column=0, shift=(1, 0)),
            Placed(Thing("big", "purple", "square"), row=1, column=0, shift=(2, -1)),
            Placed(Thing("small", "blue", "square"), row=3, column=1, shift=(-1, -2)),
        ),
    )


def test_png_holds_the_exact_picture() -> None:
    picture = draw_picture(random_scenes(1)[0])
    with Image.open(io.BytesIO(encode_png(picture))) as stored:
        assert (stored.format, stored.mode, stored.size) == ("PNG", "RGB", (PICTURE_SIDE, PICTURE_SIDE))
        assert stored.tobytes() == picture.tobytes()


def test_objects_are_two_to_four_in_different_cells_in_reading_order() -> None:
    for scene in random_scenes(500):
        cells = [(placed.row, placed.column) for placed in scene.objects]
        assert 2 <= len(cells) <= 4
        assert cells == sorted(set(cells))


def test_no_two_objects_share_colour_and_shape() -> None:
    for scene in random_scenes(500):
        assert len({(thing.colour, thing.shape) for thing in scene.things}) == len(scene.things)


def test_number_of_objects_can_be_asked_for() -> None:
    rng = random.Random(1)
    assert {len(random_scene(rng, num_objects=3).objects) for _ in range(50)} == {3}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", RADIUS_BY_SIZE)
def test_centre_of_an_object_has_its_colour_and_the_corner_the_background(shape: str, size: str) -> None:
    picture = draw_picture(scene_of(centred(size, "red", shape), background="teal"))
    # Cell (1, 1) of 28-px cells.
    assert picture.getpixel((42, 42)) == COLOURS["red"]
    assert picture.getpixel((0, 0)) == BACKGROUNDS["teal"]


@pytest.mark.parametrize("shape", SHAPES)
def test_big_and_small_differ_in_area(shape: str) -> None:
    def area(size: str) -> int:
        picture = draw_picture(scene_of(centred(size, "white", shape), background="brown"))
        return sum(count for count, colour in picture.getcolors(1 << 14) if colour == COLOURS["white"])

    assert area("big") > 2 * area("small") > 0


def test_shapes_of_one_size_are_all_different() -> None:
    pictures = {draw_picture(scene_of(centred("small", "red", shape))).tobytes() for shape in SHAPES}
    assert len(pictures) == len(SHAPES)


def test_an_object_never_leaves_its_cell() -> None:
    assert max(RADIUS_BY_SIZE.values()) + MAX_JITTER <= CELL // 2


def test_a_picture_is_four_by_four_image_tokens() -> None:
    # Qwen2-VL merges 2x2 patches of 14 px into one image token.
    assert (PICTURE_SIDE, CELL) == (4 * 28, 28)
