"""Fixtures that cost something and never change."""

from __future__ import annotations

import functools
import gc
import inspect
import os
import signal
from pathlib import Path

import pytest

from made_once import made_once
from warm import keep_parents, module_of

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["DO_NOT_TRACK"] = "1"  # kedro-telemetry, in the projects that tests make
# A shell's background job ignores these two, and so would every process that a test starts and interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
for name in [name for name in os.environ if name.startswith("SWANLAB_")]:
    del os.environ[name]  # a key would send what the tests make
keep_parents()
inspect.getmodule = functools.partial(module_of, inspect.getmodule)
gc.disable()  # until all tests are imported
PROJECT = Path(__file__).parents[1]
TINY_BASE = PROJECT / "data" / "06_models" / "tiny_qwen2_vl"


HEAVY = (
    "faults/test_training.py",
    "training/test_two_ranks.py",
    "datasets/test_hub.py",
    "tracking/test_tracker.py",
    "cluster/test_ranks.py",
    "reliability/test_faults.py",
    "hub/test_recipes.py",
    "pipelines/test_training.py",
    "pipelines/test_kinds_of_training.py",
    "runs/test_replays.py",
    "faults/test_interruptions.py",
    "pipelines/test_tracking.py",
    "commands/test_caption.py",
    "viz/test_viz.py",
    "test_command_line.py",
)
"""What takes longest begins first, or one process would end with it while the others have nothing left to do."""


def pytest_collection_finish():
    gc.enable()


def pytest_runtest_logstart(nodeid):
    """Leave what is imported out of garbage collections, which trainings ask for."""
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()


def pytest_collection_modifyitems(items):
    place = {str(PROJECT / "tests" / name): number for number, name in enumerate(HEAVY)}
    items.sort(key=lambda item: place.get(str(item.path), len(HEAVY)))


@functools.cache
def make_processor():
    from qwen_vl_lora.tiny.tiny_model import build_processor

    return build_processor(0)


@pytest.fixture(scope="session")
def processor():
    return make_processor()


@pytest.fixture(scope="session")
def base_path(tmp_path_factory):
    """`base_path(family, tied=…)`: directory of a random tiny model, made once."""
    from tiny_models import save_tiny_base

    def make(family: str, *, tied: bool = True) -> Path:
        def save(folder: Path) -> None:
            folder.mkdir()
            save_tiny_base(folder, make_processor(), family, tied=tied)

        return made_once(tmp_path_factory.getbasetemp(), f"{family}_{tied}", save)

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
