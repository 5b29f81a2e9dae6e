"""Repositories on a ModelScope hub: their names, their listings, and whether the hub can be reached.

Everything that a hub says is checked here before anything is written. `MODELSCOPE_ENDPOINT` names
another hub, `MODELSCOPE_CACHE` another place for what is fetched; both are the client's own.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qwen_vl_lora.exceptions import DataFormatError, MissingArtifactError, QwenVLLoraError
from qwen_vl_lora.hub.fetching import call_within

if TYPE_CHECKING:
    from modelscope_hub.config import HubConfig

Kind = Literal["model", "dataset"]

DEFAULT_REVISION = "master"
REACH_SECONDS = 5.0
"""How long a hub may take to answer at all."""

_NAME = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"
_REPOSITORY = re.compile(rf"(?P<id>{_NAME}/{_NAME})(@(?P<revision>{_NAME}))?")


@dataclass(frozen=True)
class Repository:
    """A model or dataset on the hub at one revision: a branch, a tag or a commit."""

    kind: Kind
    id: str
    revision: str = DEFAULT_REVISION

    def __str__(self) -> str:
        return f"{self.id}@{self.revision}"


@dataclass(frozen=True)
class ListedFile:
    """A file of a repository as the hub lists it. `sha256` is empty where the hub gives none."""

    name: str
    size: int
    sha256: str


def parse_repository(kind: Kind, text: str) -> Repository | None:
    """`owner/name` or `owner/name@revision`; None for anything else."""
    match = _REPOSITORY.fullmatch(text)
    return Repository(kind, match["id"], match["revision"] or DEFAULT_REVISION) if match else None


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hub_config() -> HubConfig:
    """The client's own settings: endpoint and cache folder."""
    from modelscope_hub.config import HubConfig

    return HubConfig()


def require_reachable(repository: Repository, remedy: str) -> None:
    """Ask the hub for a sign of life.

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
            f"({_first_line(error)}). {remedy} Another hub: set MODELSCOPE_ENDPOINT."
        ) from error


def list_files(repository: Repository) -> list[ListedFile]:
    """Files of a repository, with names that lead nowhere else.

    Raises:
        MissingArtifactError: when the hub has no such repository or revision, or does not answer.
        DataFormatError: when a name in the listing is not what a file of a repository may be called.
    """
    from modelscope_hub import HubApi

    with hub_faults(repository):
        listed = HubApi(endpoint=hub_config().endpoint).list_repo_files(
            repository.id, repository.kind, revision=repository.revision
        )
    for entry in listed:
        _check_entry(repository, entry)
    return [ListedFile(entry.path, entry.size, (entry.sha256 or "").lower()) for entry in listed if not entry.is_dir]


@contextmanager
def hub_faults(repository: Repository) -> Iterator[None]:
    """Turn the client's errors into one message that says what to do."""
    import requests
    from modelscope_hub.errors import APIError, FileDownloadError, HubError, NotExistError

    try:
        yield
    except FileDownloadError as error:
        faults = "; ".join(f"{name}: {_first_line(fault)}" for name, fault in sorted(error.failed_files.items()))
        raise MissingArtifactError(
            f"The {repository.kind} {repository} was not downloaded whole: {faults}. What arrived is kept; "
            "start the same command again and it goes on from there."
        ) from error
    except (NotExistError, requests.HTTPError) as error:
        raise MissingArtifactError(
            f"The hub {hub_config().endpoint} has no {repository.kind} {repository.id} at revision "
            f"{repository.revision}, or does not show it to you ({_first_line(error)}). Check both names; a "
            "private one wants MODELSCOPE_API_TOKEN."
        ) from error
    except (HubError, requests.RequestException, ConnectionError, TimeoutError) as error:
        kind = "answers with an error" if isinstance(error, APIError) else "cannot be reached"
        raise MissingArtifactError(
            f"The hub {hub_config().endpoint} {kind} for the {repository.kind} {repository}: {_first_line(error)}. "
            "What arrived is kept; start the same command again later and it goes on from there."
        ) from error
    except FileNotFoundError as error:
        raise MissingArtifactError(
            f"The {repository.kind} {repository} does not hold what is needed: {_first_line(error)}. Look at its files "
            "on the hub."
        ) from error
    except OSError as error:
        raise QwenVLLoraError(
            f"The {repository.kind} {repository} cannot be written below {hub_config().cache_dir}: "
            f"{_first_line(error)}. Make room or set MODELSCOPE_CACHE; what arrived is kept."
        ) from error


def _check_entry(repository: Repository, entry: Any) -> None:
    """Refuse a whole listing for one name: a hub that lists such a name cannot be believed in the rest."""
    parts = entry.path.split("/")
    bad = (
        any(part in ("", ".", "..") for part in parts)
        or "\\" in entry.path
        or not entry.path.isprintable()
        or re.match(r"[A-Za-z]:", entry.path)
    )
    if bad:
        raise DataFormatError(
            f"The hub lists the file {entry.path!r} in {repository}, a name that leads outside its folder. Nothing was "
            "written. Do not use this repository."
        )
    if entry.type not in ("blob", "tree"):
        raise DataFormatError(
            f"The hub lists {entry.path!r} in {repository} as {entry.type!r}; only plain files are taken, no links. "
            "Nothing was written. Do not use this repository."
        )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
