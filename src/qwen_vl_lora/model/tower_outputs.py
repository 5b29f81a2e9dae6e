"""The argument `mm_encoder_outputs` for models of a transformers that lacks it, such as 5.17.

There a model silently ignores the argument, and would be trained without its pictures.
"""

from __future__ import annotations

import inspect
from typing import Any

ARGUMENT = "mm_encoder_outputs"


def accept_tower_outputs(model: Any) -> None:
    """Let a model take stored features of its pictures, if it does not by itself.

    Args:
        model: the one between tower and language model, which calls its own `get_image_features`.
    """
    if ARGUMENT not in inspect.signature(model.forward).parameters:
        model.register_forward_pre_hook(_give_outputs, with_kwargs=True)


def _give_outputs(model: Any, args: tuple[Any, ...], given: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """In the place of pixels: the model asks for its tower's output, and gets the stored one."""
    outputs = given.pop(ARGUMENT, None)
    vars(model).pop("get_image_features", None)
    if outputs is not None:
        given["pixel_values"] = outputs["image"].pooler_output[0]  # only looked at for not being None
        model.get_image_features = lambda *_, **__: outputs["image"]
    return args, given
