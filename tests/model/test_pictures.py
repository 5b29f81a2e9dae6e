"""The size of a picture at the model's door."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_vl_lora.exceptions import DataFormatError, ParameterError
from qwen_vl_lora.model.pictures import PictureSizer, smart_resize


def test_a_picture_of_which_nothing_would_be_left_is_named_with_the_limits_that_it_needs(image_parameters):
    sizer = PictureSizer(image_parameters, patch_size=14, merge_size=2)  # 140 x 140 px: 25 image tokens
    assert sizer.grid(28, 28 * 25) == (1, 50, 2)
    with pytest.raises(DataFormatError, match="2800x28 px, .* 19600.*lower image.max_aspect_ratio to 25"):
        sizer.grid(2800, 28)


def test_a_size_that_tokens_do_not_fill_is_said(image_parameters):
    def said(height, width, patch):
        size = {"resized_height": height, "resized_width": width, "min_pixels": None, "max_pixels": None}
        return PictureSizer(image_parameters.model_copy(update=size), patch, 2).rounding()

    assert said(280, 280, 14) is None
    assert said(280, 140, 16) == (
        "image.resized_height 280 and resized_width 140: pictures become 288 x 128 px, "
        "whole image tokens of 32 x 32 px."
    )
    assert said(None, None, 16) is None


def test_limits_that_hold_no_image_token_are_refused_by_the_size_of_the_bases_own(image_parameters):
    small = image_parameters.model_copy(update={"min_pixels": 50, "max_pixels": 1000})
    assert PictureSizer(small, patch_size=14, merge_size=2).grid(28, 28) == (1, 2, 2)
    with pytest.raises(
        ParameterError, match="max_pixels: expected at least 1024, one image token of 32 x 32 px; got 1000"
    ):
        PictureSizer(small, patch_size=16, merge_size=2)


side = st.integers(1, 6000)
pixels = st.none() | st.integers(28 * 28, 4000 * 4000)


@given(side, side, st.sampled_from([28, 32]), pixels, pixels)
def test_a_size_is_that_of_qwen_vl_utils(height, width, factor, one, other):
    from qwen_vl_utils import vision_process

    limits = (min(one, other), max(one, other)) if one and other else (None, None)
    try:
        theirs = vision_process.smart_resize(height, width, factor, *limits)
    except ValueError:
        with pytest.raises(ValueError, match="aspect ratio must be at most 200"):
            smart_resize(height, width, factor, *limits)
    else:
        assert smart_resize(height, width, factor, *limits) == theirs
