"""Fixtures that cost something and never change."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["DO_NOT_TRACK"] = "1"  # kedro-telemetry, in the projects that tests make
# A shell's background job ignores these two, and so would every process that a test starts and interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
for name in [name for name in os.environ if name.startswith("SWANLAB_")]:
    del os.environ[name]  # a key would send what the tests make
PROJECT = Path(__file__).parents[1]
TINY_BASE = PROJECT / "data" / "06_models" / "tiny_qwen2_vl"


@pytest.fixture(scope="session")
def processor():
    from qwen_vl_lora.scenes.tiny_model import build_processor

    return build_processor(0)


@pytest.fixture(scope="session")
def base_path(tmp_path_factory, processor):
    """`base_path(family, tied=…)`: directory of a random tiny model, made once."""
    from tiny_models import save_tiny_base

    made: dict[tuple[str, bool], Path] = {}

    def make(family: str, *, tied: bool = True) -> Path:
        if (family, tied) not in made:
            folder = tmp_path_factory.mktemp(f"{family}_{tied}")
            made[family, tied] = save_tiny_base(folder, processor, family, tied=tied)
        return made[family, tied]

    return make


@pytest.fixture
def image_parameters():
    """Pixel limits that keep the aspect ratio: pictures of different sizes give different token counts."""
    from qwen_vl_lora.parameters import ImageParameters

    return ImageParameters(
        resized_height=None,
        resized_width=None,
        min_pixels=56 * 56,
        max_pixels=140 * 140,
        max_source_pixels=10**6,
        max_aspect_ratio=200,
        allowed_roots=[],
        allow_urls=False,
        url_hosts=[],
        url_timeout=20.0,
        url_max_bytes=10**6,
    )


@pytest.fixture
def images(tmp_path):
    """Four pictures of four sizes."""
    from tiny_models import store_pictures

    return store_pictures(tmp_path, [(112, 112), (56, 140), (140, 84), (84, 56)])
