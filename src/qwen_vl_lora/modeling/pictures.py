"""From a picture to the vision tower's input: its size at the model's door, its token count, its pixels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qwen_vl_lora.parameters import ImageParameters

if TYPE_CHECKING:
    import torch
    from PIL import Image


@dataclass(frozen=True)
class PictureSizer:
    """How large a picture is for the model, by qwen-vl-utils' own rules.

    Attributes:
        image: the configured size or pixel limits.
        patch_size: px; side of one vision patch (14 on Qwen2-VL and 2.5-VL).
        merge_size: patches merged into one image token along each side (2).
    """

    image: ImageParameters
    patch_size: int
    merge_size: int

    @classmethod
    def for_processor(cls, processor: Any, image: ImageParameters) -> PictureSizer:
        return cls(image, processor.image_processor.patch_size, processor.image_processor.merge_size)

    def grid(self, width: int, height: int) -> tuple[int, int, int]:
        """(1, patches down, patches across) of an original of `width` x `height` px."""
        from qwen_vl_utils.vision_process import smart_resize

        factor = self.patch_size * self.merge_size
        if self.image.resized_height and self.image.resized_width:
            resized = smart_resize(self.image.resized_height, self.image.resized_width, factor)
        else:
            resized = smart_resize(height, width, factor, self.image.min_pixels, self.image.max_pixels)
        return 1, resized[0] // self.patch_size, resized[1] // self.patch_size

    def num_tokens(self, grid: tuple[int, int, int]) -> int:
        """Image tokens that stand for a picture of this grid in the text."""
        return grid[0] * grid[1] * grid[2] // self.merge_size**2

    def resize(self, picture: Image.Image) -> Image.Image:
        """RGB picture at the model's size, by qwen-vl-utils' own resampling."""
        from qwen_vl_utils import fetch_image

        limits = self.image.model_dump(
            include={"resized_height", "resized_width", "min_pixels", "max_pixels"}, exclude_none=True
        )
        return fetch_image({"image": picture, **limits}, image_patch_size=self.patch_size)


def pixel_inputs(processor: Any, sizer: PictureSizer, pictures: list[Image.Image]) -> dict[str, torch.Tensor]:
    """The vision tower's input.

    Returns:
        `pixel_values` (patches of all pictures, values of a patch) float32 and
        `image_grid_thw` (pictures, 3).
    """
    resized = [sizer.resize(picture) for picture in pictures]
    # Already at the model's size; a second resize by the processor's own limits would change the token count.
    inputs = processor.image_processor(images=resized, do_resize=False, return_tensors="pt")
    return {"pixel_values": inputs["pixel_values"], "image_grid_thw": inputs["image_grid_thw"]}
