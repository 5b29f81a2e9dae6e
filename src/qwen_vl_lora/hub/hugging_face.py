"""Repositories on a Hugging Face hub, read with the hub's own client.

Everything that the hub lists is checked here before anything is written. `HF_ENDPOINT` selects another hub, `HF_HOME`
another folder, `HF_TOKEN` opens private repositories; all are variables of the client.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from qwen_vl_lora.exceptions import DataFormatError, MissingArtifactError, QwenVLLoraError
from qwen_vl_lora.hub.repositories import (
    REACH_SECONDS,
    Kind,
    ListedFile,
    Repository,
    check_listed_name,
    first_line,
)

PAUSES = (0.5, 1.0, 2.0, 4.0)
"""Seconds before each further attempt at a file for which the hub has an error of its own (status 500 and above).

The client retries broken connections itself, but not these.
"""

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}|git:[0-9a-f]{40}")
_RESUMES = "Downloaded parts are kept; repeat the command to resume."
_WORDS: dict[Kind, str] = {"model": "model", "dataset": "data set"}


def home(kind: Kind) -> Path:
    """Folder below `HF_HOME`, separate from the client's cache, whose files are links into a store."""
    from huggingface_hub import constants

    return Path(os.environ.get("HF_HOME") or constants.HF_HOME).expanduser() / "qwen-vl-lora" / f"{kind}s"


def require_reachable(repository: Repository, remedy: str = _RESUMES) -> None:
    """Check that the hub responds and has the revision.

    Raises:
        MissingArtifactError: within seconds, with the remedy.
    """
    from huggingface_hub import HfApi

    with faults(repository, remedy):
        HfApi(endpoint=endpoint()).repo_info(
            repository.id, repo_type=repository.kind, revision=repository.revision, timeout=2 * REACH_SECONDS
        )


def list_files(repository: Repository) -> tuple[str, list[ListedFile]]:
    """Return the commit that the revision resolves to now, and its files, whose names are checked.

    Raises:
        MissingArtifactError: when the hub has no such repository or revision, or does not respond.
        DataFormatError: when a name in the listing leads outside its folder, or a hash is not one.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    api, kind = HfApi(endpoint=endpoint()), repository.kind
    with faults(repository):
        info = api.repo_info(repository.id, repo_type=kind, revision=repository.revision, timeout=2 * REACH_SECONDS)
        commit = str(info.sha)
        tree = list(api.list_repo_tree(repository.id, recursive=True, revision=commit, repo_type=kind))
    files = [
        ListedFile(entry.path, entry.size, f"sha256:{entry.lfs.sha256}" if entry.lfs else f"git:{entry.blob_id}")
        for entry in tree
        if isinstance(entry, RepoFile)
    ]
    for file in files:
        check_listed_name(str(repository), file.name)
        if not _DIGEST.fullmatch(file.digest):  # it names the part of a download
            raise DataFormatError(
                f"The hub lists {file.name!r} in {repository} with {file.digest!r}, which is not a hash. Nothing was "
                "written. Do not use this repository."
            )
    return commit, files


def download(repository: Repository, commit: str, file: ListedFile, folder: Path, *, anew: bool) -> None:
    """Download a file of a commit into a folder. A part that a killed download left there is resumed.

    Args:
        anew: discard such a part.

    Raises:
        MissingArtifactError: when it cannot be downloaded completely.
        QwenVLLoraError: when it cannot be written.
    """
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

    part = folder / ".incomplete" / file.digest.partition(":")[2]
    with faults(repository):
        part.parent.mkdir(parents=True, exist_ok=True)
        (folder / file.name).parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(f"{part}.lock"):  # of another run that downloads the same
            if anew:
                part.unlink(missing_ok=True)
            for pause in (*PAUSES, None):
                try:
                    _resume(repository, commit, file, part)
                    break
                except HfHubHTTPError as error:
                    if pause is None or error.response.status_code < 500:
                        raise
                    time.sleep(pause)
            part.replace(folder / file.name)


def _resume(repository: Repository, commit: str, file: ListedFile, part: Path) -> None:
    """Complete the part of a file, with the client's own request.

    `hf_hub_download` would begin a download that was killed from the start.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    url = hf_hub_url(repository.id, file.name, repo_type=repository.kind, revision=commit, endpoint=endpoint())
    place = get_hf_file_metadata(url).location
    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    if urlsplit(place).netloc != urlsplit(url).netloc:  # a signed URL of other storage, which gets no token
        headers.pop("authorization", None)
    part.touch()
    with part.open("r+b") as opened:
        start = opened.seek(0, os.SEEK_END)
        if start > file.size:
            start = opened.truncate(opened.seek(0))
        http_get(
            place,
            opened,
            resume_size=start,
            headers=headers,
            expected_size=file.size,
            displayed_filename=file.name,
        )


def endpoint() -> str:
    """URL of the hub: `HF_ENDPOINT`, or the client's own."""
    from huggingface_hub import constants

    return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")


@contextmanager
def faults(repository: Repository, remedy: str = _RESUMES) -> Iterator[None]:
    """Turn errors of the client into one message with a remedy. The message never contains a token."""
    from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError, of the client beneath
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        HTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    what = _WORDS[repository.kind]
    try:
        yield
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise MissingArtifactError(
            f"The hub {endpoint()} has no {what} {repository.id} at revision {repository.revision}, or you have "
            f"no access to it ({_said(error)}). Check both names; a private or gated {what} needs HF_TOKEN in the "
            "environment."
        ) from error
    except OfflineModeIsEnabled as error:
        raise MissingArtifactError(
            f"HF_HUB_OFFLINE is set, so the hub is not asked for {repository}. Unset it, or download the {what} on a "
            "machine with a network and copy its folder."
        ) from error
    except EntryNotFoundError as error:
        raise MissingArtifactError(f"{repository} lists a file that it does not have: {_said(error)}.") from error
    except HfHubHTTPError as error:
        raise MissingArtifactError(
            f"The hub {endpoint()} returned an error for {repository}: {_said(error)}. {remedy}"
        ) from error
    except (HTTPError, ConnectionError, TimeoutError) as error:
        raise MissingArtifactError(
            f"The hub {endpoint()} cannot be reached for {repository}: {_said(error)}. {remedy} To use "
            "another hub, set HF_ENDPOINT."
        ) from error
    except ValueError as error:  # an answer that is not JSON
        raise MissingArtifactError(
            f"The hub {endpoint()} returned an error for {repository}: {_said(error)}. {remedy}"
        ) from error
    except OSError as error:
        if error.errno is not None:
            raise QwenVLLoraError(
                f"{repository} cannot be written to {home(repository.kind)}: {_said(error)}. Free some space or set "
                "HF_HOME."
            ) from error
        raise MissingArtifactError(f"{repository} was not downloaded completely: {_said(error)}. {remedy}") from error


def _said(error: BaseException) -> str:
    """Return the first line of an error without URL queries, which are secret in signed URLs."""
    return re.sub(r"\?\S+", "?…", first_line(error)).rstrip(".")
