"""Real disks, limits and permissions to fail on."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from command_line import project_with_data

# Root without these is refused by the kernel like anybody else.
WITHOUT_RIGHTS = ("setpriv", "--inh-caps=-all", "--bounding-set=-dac_override,-dac_read_search,-fowner")
SOMEBODY_ELSE = 65534


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A project in which data_engineering has run once. Read-only: copy it."""
    return project_with_data(tmp_path_factory.getbasetemp(), tmp_path_factory.mktemp("finished") / "project")


class Disk:
    """A small disk of its own, mounted on a folder."""

    def __init__(self, path: Path, kilobytes: int) -> None:
        self.path = path
        path.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(path)], check=True)

    def leave(self, kilobytes: int) -> None:
        """Fill the disk up to so much free space."""
        facts = os.statvfs(self.path)
        taken = facts.f_bavail * facts.f_frsize - kilobytes * 1024
        assert taken > 0, "the disk is fuller than that already"
        (self.path / "ballast").write_bytes(bytes(taken))

    def make_room(self) -> None:
        (self.path / "ballast").unlink()

    def remount(self, option: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{option}", str(self.path)], check=True)


@pytest.fixture
def disk(tmp_path, finished) -> Iterator[Disk]:
    """A disk with a copy of the finished project."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a disk needs root")
    try:
        disk = Disk(tmp_path / "disk", kilobytes=8192)
    except subprocess.CalledProcessError:
        pytest.skip("this machine lets nobody mount")
    try:
        shutil.copytree(finished, disk.path, dirs_exist_ok=True)
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", str(disk.path)], check=True)


@pytest.fixture
def project(tmp_path, finished) -> Path:
    """A copy of the finished project."""
    return shutil.copytree(finished, tmp_path / "project")


@pytest.fixture
def without_rights() -> tuple[str, ...]:
    """What to write before a command, so that file modes hold for it."""
    if os.geteuid() != 0:
        return ()
    if shutil.which("setpriv") is None or subprocess.run([*WITHOUT_RIGHTS, "true"], check=False).returncode:
        pytest.skip("root cannot give up its rights here")
    return WITHOUT_RIGHTS
