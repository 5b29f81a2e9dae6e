"""Nodes that say in Kedro-Viz what they do."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

from kedro.pipeline import Node, node
from kedro.pipeline.preview_contract import TextPreview


def described_node(
    function: Callable[..., Any], inputs: str | list[str], outputs: str | list[str], tags: list[str] | None = None
) -> Node:
    """A node with its function's name, and with the first paragraph of its docstring as its preview."""
    paragraph = sentence_of(function)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The 'preview_fn' feature is experimental")
        return node(
            function,
            inputs=inputs,
            outputs=outputs,
            name=function.__name__,
            tags=tags,
            preview_fn=lambda: TextPreview(paragraph),
        )


def sentence_of(function: Callable[..., Any]) -> str:
    """The first paragraph of a docstring, in one line."""
    return " ".join((inspect.getdoc(function) or "").partition("\n\n")[0].split())
