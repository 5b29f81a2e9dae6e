"""FlexAttention for Qwen-VL's language models.

transformers has it, but none of these classes is marked as able to use it, though their layers call attention as all
others do. So it is registered under a name of its own, with the mask passed as it is given.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

FLEX = "flex_attention"
"""The value of the parameter `attention`."""

_REGISTERED = "by_block_mask"


def register_flex_attention() -> str:
    """Make it known to transformers. Returns its name there."""
    from transformers import AttentionInterface

    AttentionInterface.register(_REGISTERED, _attend)
    return _REGISTERED


def _attend(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **options: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As transformers calls attention: (B, heads, T, width) each; `attention_mask` is a block mask."""
    from transformers.integrations.flex_attention import flex_attention_forward

    return flex_attention_forward(module, query, key, value, attention_mask, **options)
