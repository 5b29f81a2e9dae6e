"""Puts the small base into the wheel: pyproject.toml can only name files inside the package."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

BASE = Path(__file__).parent / "data" / "06_models" / "tiny_qwen2_vl"


class BuildWithBase(build_py):
    """Copies the base to where `model/shipped_base.py` finds it. An editable install reads the clone's own."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            shutil.copytree(BASE, Path(self.build_lib, "qwen_vl_lora", "tiny", "base"), dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithBase})
