"""Repositories on a hub: their names and listed files, and ModelScope's listings and errors.

Everything that ModelScope returns is checked here before anything is written; `hub.hugging_face` does the same for the
other hub. `MODELSCOPE_ENDPOINT` selects another hub, `MODELSCOPE_CACHE` another download folder; both are variables of
the client.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qwen_vl_lora.exceptions import DataFormatError, MissingArtifactError, QwenVLLoraError
from qwen_vl_lora.hub.fetching import call_within
from qwen_vl_lora.runs.storage import file_sha256

if TYPE_CHECKING:
    from modelscope_hub.config import HubConfig

Kind = Literal["model", "dataset"]
Hub = Literal["ms", "hf"]

HUBS: dict[str, Hub] = {"modelscope": "ms", "huggingface": "hf"}
"""Name in the configuration → prefix of a name on that hub."""

DEFAULT_REVISION = "master"
DEFAULT_REVISIONS: dict[Hub, str] = {"ms": DEFAULT_REVISION, "hf": "main"}
REACH_SECONDS = 5.0
"""Seconds within which a hub must respond."""

MAX_ATTEMPTS = 2
"""Attempts for a file whose bytes differ from the listing. The clients retry broken connections themselves."""

_CONNECTION = re.compile(r"HTTPS?Connection(Pool)?\([^)]*\): ")
"""What urllib3 writes before the cause of a failed connection."""

_NAME = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"
_REPOSITORY = re.compile(rf"((?P<hub>hf|ms):)?(?P<id>{_NAME}/{_NAME})(@(?P<revision>{_NAME}(/{_NAME})*))?")


@dataclass(frozen=True)
class Repository:
    """A model or dataset on a hub at one revision: a branch, a tag or a commit."""

    kind: Kind
    id: str
    revision: str = DEFAULT_REVISION
    hub: Hub = "ms"

    @property
    def name(self) -> str:
        """Its name as `base_model` takes it: without a prefix on ModelScope."""
        return self.id if self.hub == "ms" else f"{self.hub}:{self.id}"

    def __str__(self) -> str:
        return f"{self.name}@{self.revision}"


@dataclass(frozen=True)
class ListedFile:
    """A file of a repository as the hub lists it.

    Attributes:
        size: in bytes.
        digest: `sha256:…`, `git:…` (the sha1 of a git blob), or empty if the hub gives none.
    """

    name: str
    size: int
    digest: str

    @property
    def sha256(self) -> str:
        """Hex sha256, or empty if the hub gives none."""
        kind, _, digest = self.digest.partition(":")
        return digest if kind == "sha256" else ""


def parse_repository(kind: Kind, text: str, hub: Hub = "ms") -> Repository | None:
    """Parse `owner/name` or `owner/name@revision`, of a model also `hf:…` and `ms:…`; None for other texts.

    Args:
        hub: of a name without a prefix.
    """
    match = _REPOSITORY.fullmatch(text)
    if match is None or (kind == "dataset" and match["hub"]):
        return None
    chosen: Hub = match["hub"] or hub  # type: ignore[assignment]  # the pattern has no other
    return Repository(kind, match["id"], match["revision"] or DEFAULT_REVISIONS[chosen], chosen)


def fault_of(path: Path, file: ListedFile) -> str | None:
    """Return how a file differs from the hub's listing, or None."""
    if not path.is_file():
        return "its size or hash differs"
    size = path.stat().st_size
    if size != file.size:
        return f"expected {file.size} bytes, got {size}"
    kind, _, digest = file.digest.partition(":")
    found = {"sha256": file_sha256, "git": _git_blob_sha1}[kind](path) if digest else digest
    return None if found == digest else f"expected the {kind} hash {digest}, got {found}"


def download_verified(path: Path, file: ListedFile, download: Callable[[bool], None]) -> str | None:
    """Bring a file to a path unless it is there as listed. Return how it differs in the end, or None.

    Args:
        download: writes the file; resumes a broken download, unless its argument says to begin anew.
    """
    if path.is_symlink():  # the clients would write through the link
        path.unlink()
    fault = fault_of(path, file)
    for attempt in range(MAX_ATTEMPTS):
        if fault is None:
            break
        path.unlink(missing_ok=True)
        download(attempt > 0)
        fault = fault_of(path, file)
    if fault is not None:
        path.unlink(missing_ok=True)
    return fault


def _git_blob_sha1(path: Path) -> str:
    hashed = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as opened:
        while part := opened.read(2**20):
            hashed.update(part)
    return hashed.hexdigest()


def hub_config() -> HubConfig:
    """Return the client's configuration: endpoint and cache folder."""
    from modelscope_hub.config import HubConfig

    return HubConfig()


def require_reachable(repository: Repository, remedy: str) -> None:
    """Check that the hub responds.

    Raises:
        MissingArtifactError: within seconds, with the remedy.
    """
    import requests

    endpoint = str(hub_config().endpoint)
    try:
        call_within(
            2 * REACH_SECONDS, lambda: requests.head(endpoint, timeout=REACH_SECONDS, allow_redirects=False).close()
        )
    except (requests.RequestException, OSError) as error:
        needed = "is not on this machine" if repository.kind == "model" else "is read from its hub at every run"
        raise MissingArtifactError(
            f"The {repository.kind} {repository} {needed}, and the hub {endpoint} cannot be reached "
            f"({first_line(error)}). {remedy} To use another hub, set MODELSCOPE_ENDPOINT."
        ) from error


def list_files(repository: Repository) -> list[ListedFile]:
    """List the files of a repository, whose names are checked to stay inside its folder.

    Raises:
        MissingArtifactError: when the hub has no such repository or revision, or does not respond.
        DataFormatError: when a name in the listing is not allowed.
    """
    from modelscope_hub import HubApi

    with hub_faults(repository):
        listed = HubApi(endpoint=hub_config().endpoint).list_repo_files(
            repository.id, repository.kind, revision=repository.revision
        )
    for entry in listed:
        _check_entry(repository, entry)
    return [
        ListedFile(entry.path, entry.size, f"sha256:{entry.sha256.lower()}" if entry.sha256 else "")
        for entry in listed
        if not entry.is_dir
    ]


@contextmanager
def hub_faults(
    repository: Repository, remedy: str = "Downloaded parts are kept; repeat the command later to resume."
) -> Iterator[None]:
    """Turn errors of the client into one message with a remedy."""
    import requests
    from modelscope_hub.errors import APIError, FileDownloadError, HubError, NotExistError

    try:
        yield
    except FileDownloadError as error:
        faults = "; ".join(f"{name}: {first_line(fault)}" for name, fault in sorted(error.failed_files.items()))
        raise MissingArtifactError(
            f"The {repository.kind} {repository} was not downloaded completely: {faults}. Downloaded parts are kept; "
            "repeat the command to resume."
        ) from error
    except (NotExistError, requests.HTTPError) as error:
        raise MissingArtifactError(
            f"The hub {hub_config().endpoint} has no {repository.kind} {repository.id} at revision "
            f"{repository.revision}, or you have no access to it ({first_line(error)}). Check both names; a "
            f"private {repository.kind} needs MODELSCOPE_API_TOKEN."
        ) from error
    except (HubError, requests.RequestException, ConnectionError, TimeoutError) as error:
        kind = "returned an error" if isinstance(error, APIError) else "cannot be reached"
        raise MissingArtifactError(
            f"The hub {hub_config().endpoint} {kind} for the {repository.kind} {repository}: {first_line(error)}. "
            f"{remedy}"
        ) from error
    except FileNotFoundError as error:
        raise MissingArtifactError(
            f"The {repository.kind} {repository} lacks required files: {first_line(error)}. Check its files on the hub."
        ) from error
    except OSError as error:
        raise QwenVLLoraError(
            f"The {repository.kind} {repository} cannot be written to {hub_config().cache_dir}: "
            f"{first_line(error)}. Free some space or set MODELSCOPE_CACHE; downloaded parts are kept."
        ) from error


def check_listed_name(repository: str, name: str) -> None:
    """Refuse the whole listing for one bad name, because the rest cannot be trusted either.

    Raises:
        DataFormatError: for a name that leads outside its folder.
    """
    bad = (
        any(part in ("", ".", "..") for part in name.split("/"))
        or "\\" in name
        or not name.isprintable()
        or re.match(r"[A-Za-z]:", name)
    )
    if bad:
        raise DataFormatError(
            f"The hub lists the file {name!r} in {repository}, which leads outside its folder. Nothing was "
            "written. Do not use this repository."
        )


def _check_entry(repository: Repository, entry: Any) -> None:
    check_listed_name(str(repository), entry.path)
    if entry.type not in ("blob", "tree"):
        raise DataFormatError(
            f"The hub lists {entry.path!r} in {repository} as {entry.type!r}; expected plain files, no links. "
            "Nothing was written. Do not use this repository."
        )


def first_line(error: BaseException) -> str:
    """Return the first line of an error, or its type; of a failed connection the cause alone."""
    cause = getattr(next(iter(error.args), None), "reason", None)  # of urllib3, inside the error of requests
    text = _CONNECTION.sub("", str(cause or error).strip())
    return (text.splitlines() or [type(error).__name__])[0][:300]
