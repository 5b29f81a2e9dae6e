"""The order of the playground's start."""

from __future__ import annotations

import os
import time

import pytest

from playground.conftest import playground_server

pytest.importorskip("gradio")

TORCH = """
import sys, time
from pathlib import Path
page = sys.modules.get("qwen_vl_lora.playground.page")
Path(__file__).with_name("seen").write_text("page" if hasattr(page, "serve_with") else "no page")
time.sleep(3600)
"""


def test_the_page_is_imported_before_the_model_and_answers_while_it_is_loading(project, tmp_path):
    """A torch whose import does not end stands for a model that takes long to load."""
    (tmp_path / "torch.py").write_text(TORCH)
    paths = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    with playground_server(project, PYTHONPATH=paths):
        while not (seen := tmp_path / "seen").exists() or not seen.read_text():
            time.sleep(0.05)
        assert seen.read_text() == "page"
