"""Files that are sent to a model repository on a hub, by its own client: private unless told, and never twice."""

from __future__ import annotations

import glob
from collections.abc import Mapping
from pathlib import Path

from qwen_vl_lora.exceptions import QwenVLLoraError
from qwen_vl_lora.hub import hugging_face
from qwen_vl_lora.hub.repositories import Repository, hub_config, hub_faults

_RESUMES = "Files that were sent are kept; repeat the command to send the others."


def endpoint_of(repository: Repository) -> str:
    """URL of the repository's hub."""
    return hugging_face.endpoint() if repository.hub == "hf" else str(hub_config().endpoint)


def push(repository: Repository, files: Mapping[str, Path], *, public: bool, message: str) -> None:
    """Send files to a repository, which is created if it is not there. What the hub has already is not sent again.

    Args:
        files: name on the hub → path.
        public: whether the repository may be public; a new one then is.
        message: of the commit.

    Raises:
        QwenVLLoraError: when the repository is public without consent, or the hub refuses a file.
        MissingArtifactError: when the hub does not respond, or does not let this user write.
    """
    send = _send_to_hugging_face if repository.hub == "hf" else _send_to_modelscope
    send(repository, files, public, message)


def _send_to_hugging_face(repository: Repository, files: Mapping[str, Path], public: bool, message: str) -> None:
    from huggingface_hub import CommitOperationAdd, HfApi

    remedy = f"{_RESUMES} Writing needs a token that may write: HF_TOKEN in the environment."
    with hugging_face.faults(repository, remedy):
        api = HfApi(endpoint=hugging_face.endpoint())
        api.create_repo(repository.id, private=not public, exist_ok=True)
        _require_consent(repository, public, is_private=bool(api.repo_info(repository.id).private))
        operations = [CommitOperationAdd(name, path) for name, path in files.items()]
        try:
            api.create_commit(repository.id, operations, commit_message=message, revision=repository.revision)
        except RuntimeError as error:  # the client's own, around the fault of one file
            if error.__cause__ is None:
                raise
            raise error.__cause__ from None
        except ValueError as error:
            raise QwenVLLoraError(
                f"{repository} does not take a file: {' '.join(str(error).split())} Correct it and repeat the command."
            ) from error


def _send_to_modelscope(repository: Repository, files: Mapping[str, Path], public: bool, message: str) -> None:
    from modelscope_hub import HubApi
    from modelscope_hub.constants import Visibility
    from modelscope_hub.errors import NotExistError

    remedy = f"{_RESUMES} Writing needs a token: MODELSCOPE_API_TOKEN in the environment."
    with hub_faults(repository, remedy):
        api = HubApi(endpoint=hub_config().endpoint)
        try:
            found = api.get_repo(repository.id, "model")
        except NotExistError:
            chosen = Visibility.PUBLIC if public else Visibility.PRIVATE
            api.create_repo(repository.id, "model", visibility=chosen)
            found = api.get_repo(repository.id, "model")
        _require_consent(repository, public, is_private=found.visibility == Visibility.PRIVATE)
        for folder in dict.fromkeys(path.parent for path in files.values()):
            api.upload_folder(
                repository.id,
                "model",
                folder,
                revision=repository.revision,
                commit_message=message,
                allow_patterns=[glob.escape(name) for name, path in files.items() if path.parent == folder],
                use_cache=False,  # it would write its notes into the folder
            )


def _require_consent(repository: Repository, public: bool, *, is_private: bool) -> None:
    if not public and not is_private:
        raise QwenVLLoraError(
            f"{repository} is there already and is not private. Nothing was sent. Name another repository, or add "
            "--public."
        )
