"""The vision tower's input for a picture: its size after resizing, token count and pixels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qwen_vl_lora.exceptions import DataFormatError, ParameterError
from qwen_vl_lora.parameters import ImageParameters

if TYPE_CHECKING:
    import torch
    from PIL import Image

_LEAST_TOKENS, _MOST_TOKENS, _MOST_RATIO = 4, 16384, 200
"""qwen-vl-utils' limits of a picture's image tokens, where none are configured, and of its aspect ratio."""


@dataclass(frozen=True)
class PictureSizer:
    """The size of pictures for the model, by qwen-vl-utils' own rules.

    Attributes:
        image: the configured size or pixel limits.
        patch_size: px; side of one vision patch.
        merge_size: patches merged into one image token along each side.

    Raises:
        ParameterError: if `image.max_pixels` is less than one image token.
    """

    image: ImageParameters
    patch_size: int
    merge_size: int

    def __post_init__(self) -> None:
        largest = self.image.max_pixels
        if largest is not None and largest < self.token_side**2:
            raise ParameterError(
                f"image.max_pixels: expected at least {self.token_side**2}, one image token of {self.token_side} x "
                f"{self.token_side} px; got {largest}. A picture of 256 image tokens has {256 * self.token_side**2} px."
            )

    @property
    def token_side(self) -> int:
        """px; side of the square that one image token represents."""
        return self.patch_size * self.merge_size

    def rounding(self) -> str | None:
        """A sentence on a configured size that image tokens do not fill; None if they do, or if no size is fixed."""
        height, width = self.image.resized_height, self.image.resized_width
        if height is None or width is None:
            return None
        _, down, across = self.grid(width, height)
        becomes = down * self.patch_size, across * self.patch_size
        if becomes == (height, width):
            return None
        return (
            f"image.resized_height {height} and resized_width {width}: pictures become {becomes[0]} x {becomes[1]} px, "
            f"whole image tokens of {self.token_side} x {self.token_side} px."
        )

    def grid(self, width: int, height: int) -> tuple[int, int, int]:
        """(1, patches down, patches across) of an original of `width` x `height` px.

        Raises:
            DataFormatError: if the picture is so long that its short side would become 0.
        """
        factor = self.token_side
        if self.image.resized_height and self.image.resized_width:
            resized = smart_resize(self.image.resized_height, self.image.resized_width, factor)
        else:
            resized = smart_resize(height, width, factor, self.image.min_pixels, self.image.max_pixels)
            if 0 in resized:
                raise DataFormatError(
                    f"A picture of {width}x{height} px, resized to image.max_pixels {self.image.max_pixels}, would "
                    f"have less than the {factor} px that the model needs on its short side. Raise image.max_pixels, "
                    "or lower image.max_aspect_ratio to "
                    f"{self.image.max_pixels // factor**2 if self.image.max_pixels else 1} and run data_engineering "
                    "again, which rejects such pictures."
                )
        return 1, resized[0] // self.patch_size, resized[1] // self.patch_size

    def num_tokens(self, grid: tuple[int, int, int]) -> int:
        """Image tokens in the text for a picture of this grid."""
        return grid[0] * grid[1] * grid[2] // self.merge_size**2

    def resize(self, picture: Image.Image) -> Image.Image:
        """RGB picture at the model's size, by qwen-vl-utils' own resampling."""
        from qwen_vl_utils import fetch_image

        limits = {name: side for name, side in self.image.size.items() if side is not None}
        return fetch_image({"image": picture, **limits}, image_patch_size=self.patch_size)


def pixel_inputs(processor: Any, sizer: PictureSizer, pictures: list[Image.Image]) -> dict[str, torch.Tensor]:
    """The vision tower's input.

    Returns:
        `pixel_values` (patches of all pictures, values of a patch) float32 and
        `image_grid_thw` (pictures, 3).
    """
    resized = [sizer.resize(picture) for picture in pictures]
    # They have the model's size already; resizing by the processor's own limits would change the token count.
    inputs = processor.image_processor(images=resized, do_resize=False, return_tensors="pt")
    return {"pixel_values": inputs["pixel_values"], "image_grid_thw": inputs["image_grid_thw"]}


def smart_resize(
    height: int, width: int, factor: int, min_pixels: int | None = None, max_pixels: int | None = None
) -> tuple[int, int]:
    """Height and width as qwen-vl-utils' function of this name gives them; importing that one imports torch.

    Both are multiples of `factor`, their product lies within the limits, the aspect ratio is kept as far as possible.

    Raises:
        ValueError: if the aspect ratio is above 200.
    """
    most = _MOST_TOKENS * factor**2 if max_pixels is None else max_pixels
    least = _LEAST_TOKENS * factor**2 if min_pixels is None else min_pixels
    if max(height, width) / min(height, width) > _MOST_RATIO:
        raise ValueError(f"absolute aspect ratio must be at most {_MOST_RATIO}, got {height} x {width} px")
    sides = [max(factor, round(side / factor) * factor) for side in (height, width)]
    if math.prod(sides) > most:
        scale = math.sqrt((height * width) / most)
        sides = [math.floor(side / scale / factor) * factor for side in (height, width)]
    elif math.prod(sides) < least:
        scale = math.sqrt(least / (height * width))
        sides = [math.ceil(side * scale / factor) * factor for side in (height, width)]
    return sides[0], sides[1]
