"""Objects of S3 and of servers with its interface: copied into a folder once, or read.

Keys, region and endpoint come from the environment alone, by AWS's names: `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`,
`AWS_SESSION_TOKEN`, `AWS_REGION`, `AWS_ENDPOINT_URL`. Without a key objects are read anonymously. Knows nothing of
captions.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_vl_lora.exceptions import MissingArtifactError
from qwen_vl_lora.hub.fetching import FetchError
from qwen_vl_lora.runs.storage import temporary

_PLACE = re.compile(r"s3:/{1,2}(?P<bucket>[a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(/(?P<key>.*))?")
"""Also with one slash, which is what a `Path` leaves."""

_SECONDS = 20.0
"""Longest wait for a connection, and for an answer."""


def parse_s3(place: str) -> tuple[str, str] | None:
    """Bucket and key of `s3://bucket/key`; None for any other place."""
    named = _PLACE.fullmatch(place)
    return None if named is None else (named["bucket"], (named["key"] or "").strip("/"))


@dataclass(frozen=True)
class Bucket:
    """One bucket, and the folder of its objects on this machine. Can be pickled; each process connects itself."""

    name: str

    def __str__(self) -> str:
        return f"s3://{self.name}"

    @property
    def folder(self) -> Path:
        """Where objects are copied to, under their keys."""
        home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        return home.absolute() / "qwen-vl-lora" / "s3" / self.name

    def address(self, path: Path) -> str | None:
        """The `s3://` address of a path below `folder`; None for any other path."""
        whole = Path(os.path.normpath(path))
        return f"{self}/{whole.relative_to(self.folder).as_posix()}" if whole.is_relative_to(self.folder) else None

    def list_files(self, prefix: str) -> list[Path]:
        """The paths below `folder` of the object named `prefix`, or of all below it; nothing is copied.

        Raises:
            MissingArtifactError: when there is none, or the server does not answer.
        """
        from pyarrow.fs import FileSelector, FileType

        found = self._ask(lambda files: files.get_file_info(f"{self.name}/{prefix}"), prefix)
        listed = [found]
        if found.type != FileType.File:
            selector = FileSelector(f"{self.name}/{prefix}", allow_not_found=True, recursive=True)
            listed = self._ask(lambda files: files.get_file_info(selector), prefix)
        keys = [info.path.removeprefix(f"{self.name}/") for info in listed if info.type == FileType.File]
        if not keys:
            raise MissingArtifactError(f"Nothing found at {self}/{prefix}. Check bucket and key.")
        return [self.folder / key for key in keys]

    def bring(self, path: Path) -> None:
        """Copy the object of a path below `folder`, unless the copy has its size and time. Other paths are ignored.

        Raises:
            MissingArtifactError: when it cannot be copied completely.
        """
        address = self.address(path)
        if address is None:
            return
        key = address.removeprefix(f"{self}/")
        info = self._ask(lambda files: files.get_file_info(f"{self.name}/{key}"), key)
        if info.size is None:
            raise MissingArtifactError(f"{address} not found. Check its key.")
        if path.is_file() and (path.stat().st_size, path.stat().st_mtime_ns) == (info.size, info.mtime_ns):
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        if info.size > (free := shutil.disk_usage(path.parent).free):
            raise MissingArtifactError(
                f"{address} needs {info.size / 2**30:.1f} GiB in {self.folder}; {free / 2**30:.1f} GiB are free. Free "
                "some space, or set XDG_CACHE_HOME to a folder of another disk."
            )
        partial = temporary(path)
        try:
            self._ask(lambda files: _copy(files, f"{self.name}/{key}", partial), key)
            os.utime(partial, ns=(info.mtime_ns, info.mtime_ns))
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def read(self, key: str, max_bytes: int) -> bytes:
        """The bytes of an object.

        Raises:
            FetchError: when it is not there, is longer than `max_bytes`, or cannot be read.
        """
        try:
            with self._files.open_input_file(f"{self.name}/{key}") as opened:
                if opened.size() > max_bytes:
                    raise FetchError(
                        "too_large", f"The object has {opened.size()} bytes; at most {max_bytes} are read."
                    )
                data: bytes = opened.read()
                return data
        except OSError as error:
            raise FetchError("failed", f"The object cannot be read: {_said(error)}.") from error

    def _ask(self, request: Callable[[Any], Any], key: str) -> Any:
        try:
            return request(self._files)
        except OSError as error:
            raise MissingArtifactError(
                f"{self}/{key} cannot be read: {_said(error)}. Check bucket and key, and AWS_ACCESS_KEY_ID, "
                "AWS_SECRET_ACCESS_KEY, AWS_REGION and, for a server of your own, AWS_ENDPOINT_URL in the environment."
            ) from error

    @property
    def _files(self) -> Any:
        names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL")
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        return _connect(*(os.environ.get(name) for name in names), region)


@functools.cache
def _connect(key: str | None, secret: str | None, token: str | None, endpoint: str | None, region: str | None) -> Any:
    from pyarrow.fs import AwsStandardS3RetryStrategy, S3FileSystem

    keys = {"access_key": key, "secret_key": secret, "session_token": token} if key else {"anonymous": True}
    return S3FileSystem(
        **keys,
        region=region or "us-east-1",
        endpoint_override=endpoint,
        connect_timeout=_SECONDS,
        request_timeout=_SECONDS,
        retry_strategy=AwsStandardS3RetryStrategy(max_attempts=3),
    )


def _copy(files: Any, source: str, target: Path) -> None:
    with files.open_input_stream(source) as opened, target.open("wb") as written:
        shutil.copyfileobj(opened, written, 2**20)
        os.fsync(written.fileno())


def _said(error: Exception) -> str:
    return " ".join(str(error).split())[:300].rstrip(".")
