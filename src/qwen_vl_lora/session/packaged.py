"""The configuration of a project that runs from its wheel, in a folder that may hold nothing else.

`kedro package` writes it as an archive beside the wheel. In a folder without `conf/` the archive becomes `conf/`;
in one that has it, the archive must hold the same.
"""

from __future__ import annotations

import gzip
import io
import logging
import shutil
import tarfile
import zlib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from kedro.framework.project import settings

from qwen_vl_lora.exceptions import ParameterError
from qwen_vl_lora.runs.storage import make_folder, sync_tree, temporary

logger = logging.getLogger(__name__)

SUFFIXES = (".tar.gz", ".tgz")
MAX_BYTES = 20 * 2**20
"""Limit for an unpacked archive. That of this project has 0.2 MB."""


def is_archive(source: str) -> bool:
    """Whether a configuration is given as an archive, by its name."""
    return source.endswith(SUFFIXES) and not Path(source).is_dir()


def own_configuration(source: Path, project: Path) -> Path:
    """Return the configuration that is trusted: the project's `conf/`, or `source` in a folder without one."""
    own = project / settings.CONF_SOURCE
    return own if own.is_dir() else source


def unpacked(archive: Path, project: Path) -> Path:
    """Return the project's `conf/`, made from the archive if there is none.

    Raises:
        ParameterError: if the archive is unsafe or damaged, holds no configuration, or differs from `conf/`.
    """
    own = project / settings.CONF_SOURCE
    files = _read(archive)
    if not own.is_dir():
        _write(files, own)
        logger.info("Unpacked the configuration %s into %s.", archive, own)
    different = next((name for name, content in files.items() if not _is(own / name, content)), None)
    if different is not None:
        raise ParameterError(
            f"--conf-source {archive} differs from {own}: {different}. An archive is read where there is no "
            f"{settings.CONF_SOURCE}/. To take the archive, move {own} away; to take {own}, omit --conf-source."
        )
    return own


def _is(file: Path, content: bytes) -> bool:
    return file.is_file() and file.read_bytes() == content


def _read(archive: Path) -> dict[str, bytes]:
    """Return name → content of the files below the archive's `conf/`. Nothing is written.

    The decompressed bytes are limited before tarfile reads them: it would hold a header of any size in memory.
    """
    try:
        with gzip.open(archive) as file:
            plain = file.read(MAX_BYTES + 1)
        if len(plain) > MAX_BYTES:
            raise ParameterError(
                f"--conf-source {archive}: expected at most {MAX_BYTES // 2**20} MB unpacked, got more."
            )
        with tarfile.open(fileobj=io.BytesIO(plain), mode="r:") as opened:
            files = {_name_of(archive, member): _content(opened, member) for member in opened if not member.isdir()}
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise ParameterError(
            f"--conf-source {archive} cannot be read as an archive of `kedro package` (tar, gzip): {error}."
        ) from error
    if not any(name.startswith("base/") for name in files):
        raise ParameterError(
            f"--conf-source {archive}: expected the archive of `kedro package`, with {settings.CONF_SOURCE}/base/; "
            f"got {', '.join(sorted(files)[:3]) or 'no file'}."
        )
    return files


def _name_of(archive: Path, member: tarfile.TarInfo) -> str:
    """Return a member's path below `conf/`."""
    path = PurePosixPath(member.name)
    if not member.isreg():
        raise ParameterError(
            f"--conf-source {archive}: {member.name!r} is not a plain file; expected no links or devices."
        )
    if path.parts[:1] != (settings.CONF_SOURCE,) or len(path.parts) < 2 or ".." in path.parts or "\0" in member.name:
        raise ParameterError(
            f"--conf-source {archive}: {member.name!r} lies elsewhere; expected files below {settings.CONF_SOURCE}/."
        )
    return path.relative_to(settings.CONF_SOURCE).as_posix()


def _content(opened: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = opened.extractfile(member)
    content = file.read() if file else b""
    if len(content) != member.size:
        raise tarfile.ReadError(f"{member.name} ends early")
    return content


def _write(files: Mapping[str, bytes], folder: Path) -> None:
    """Write the files so that the folder appears whole. Another process may be quicker with the same."""
    partial = temporary(folder)
    try:
        for name, content in files.items():
            make_folder((partial / name).parent)
            (partial / name).write_bytes(content)
        sync_tree(partial)
        if not folder.exists():
            partial.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
