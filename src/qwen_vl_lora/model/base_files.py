"""The files of a base model's folder: those that are read and so belong to its fingerprint, and those that are refused.

Follows what transformers 5.23, tokenizers and PEFT open in a folder. Files that they never open (README, licence,
pictures, GGUF, pickles beside safetensors) are ignored. Imports neither torch nor transformers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qwen_vl_lora.exceptions import BaseModelError, MissingArtifactError
from qwen_vl_lora.model.families import Family
from qwen_vl_lora.model.fingerprints import stored_tensors
from qwen_vl_lora.strict_json import kind_of, read_object

_SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
    # Published Qwen checkpoints have none of these, so their fingerprints do not change.
    "video_preprocessor_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "tekken.json",
)
"""Files that a prediction depends on besides the weights, if they exist."""

_SIDE_PATTERNS = ("*.model", "*.tiktoken", "additional_chat_templates/*.jinja")

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"

_FOREIGN = {
    "adapter_config.json": "transformers would put that adapter on the base, and all results would change",
    "audio_tokenizer_config.json": "it makes transformers load another model from a place that it names",
}
"""Files that transformers opens but that do not belong to a base model."""

_ATTENTION_KEYS = ("attn_implementation", "_attn_implementation")
_CODE_KEYS = ("auto_map", "kernel_config", "custom_generate")
_LEADING_KEYS = {
    "transformers_weights": "names other weights",
    "configuration_files": "names other configurations",
    "fast_tokenizer_files": "names other tokenizers",
    "audio_tokenizer": "names another model",
    "quantization_config": "describes weights that are stored quantized",
    "fusion_config": "replaces modules of the architecture",
    "distributed_config": "splits the model over processes",
}
"""Keys that refer to files outside the fingerprint, or to another architecture."""


def side_files(folder: Path) -> list[Path]:
    """The files that are read besides the weights, known names first.

    Raises:
        BaseModelError: if one of them is not a regular file.
    """
    named = [folder / name for name in _SIDE_FILES]
    matched = sorted(path for pattern in _SIDE_PATTERNS for path in folder.glob(pattern))
    return [path for path in [*named, *matched] if _is_file(path)]


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers loads: the single file, or those of the index.

    Raises:
        MissingArtifactError: if there are none.
        BaseModelError: if there are only pickles, weights beside those that are loaded, or an index of files elsewhere.
    """
    there = sorted(path.name for path in folder.glob("*.safetensors"))
    whole, indexed = _is_file(folder / _WEIGHTS), _is_file(folder / _INDEX)
    if whole and indexed:
        raise BaseModelError(
            f"Base model {folder} has {_WEIGHTS} and {_INDEX}, which may be two different models. Expected one of "
            "them. Remove the one that does not belong to the model."
        )
    if not whole and not indexed:
        _refuse_other_forms(folder, there)
    paths = [folder / _WEIGHTS] if whole else _indexed_files(folder)
    surplus = sorted(set(there) - {path.name for path in paths})
    if surplus:
        raise BaseModelError(
            f"Base model {folder} has weights that are not loaded: {', '.join(surplus)}. Expected only "
            f"{', '.join(path.name for path in paths[:3])}{' …' if len(paths) > 3 else ''}. Move the others elsewhere."
        )
    for path in paths:
        if not _is_file(path):
            raise MissingArtifactError(f"Base model {folder} lacks {path.name}. Fetch the model again.")
    return paths


def _refuse_other_forms(folder: Path, there: list[str]) -> None:
    if there:
        raise BaseModelError(
            f"Base model {folder} has neither {_WEIGHTS} nor {_INDEX}, which say what to load; found "
            f"{', '.join(there)}. Fetch the model again."
        )
    pickles = sorted(path.name for path in [*folder.glob("*.bin"), *folder.glob("*.pt*")])
    if pickles:
        raise BaseModelError(
            f"Base model {folder} holds only pickle files ({', '.join(pickles)}), which can run code when "
            "loaded. Convert it to safetensors or take a checkpoint that has them."
        )
    raise MissingArtifactError(f"Base model {folder} has no *.safetensors. Fetch the model again.")


def _indexed_files(folder: Path) -> list[Path]:
    names = sorted(set(_weight_map(folder).values()))
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise BaseModelError(
                f"{folder / _INDEX} names {name!r}; expected the name of a safetensors file beside it. "
                "Fetch the model again from a source that you trust."
            )
    return [folder / name for name in names]


def _weight_map(folder: Path) -> dict[str, str]:
    """Tensor → file."""
    weight_map = read_settings(folder / _INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BaseModelError(f"{folder / _INDEX} names no weight files. Fetch the model again.")
    return {name: str(file) for name, file in weight_map.items()}


def check_tensors(folder: Path, paths: list[Path], family: Family) -> None:
    """Check that the files have each tensor once, and those of the index. Reads only their headers.

    Raises:
        BaseModelError: naming the tensor and its files.
    """
    tensors = [tensor for path in paths for tensor in stored_tensors(path)]
    twice = [name for name, count in Counter(family.published_tensor(t.name) for t in tensors).items() if count > 1]
    if twice:
        files = sorted({tensor.path.name for tensor in tensors if family.published_tensor(tensor.name) == twice[0]})
        raise BaseModelError(
            f"Base model {folder} has the tensor {twice[0]} more than once (in {', '.join(files)}). Expected each "
            "tensor once. Fetch the model again."
        )
    if paths == [folder / _WEIGHTS]:
        return
    said, found = set(_weight_map(folder).items()), {(tensor.name, tensor.path.name) for tensor in tensors}
    for name, file in sorted(said ^ found):
        where = "which the file does not have" if (name, file) in said else "which the index does not list there"
        raise BaseModelError(
            f"{folder / _INDEX} and the weight files differ: tensor {name} in {file}, {where}. Fetch the model again."
        )


def check_contents(folder: Path) -> None:
    """Check that the folder's texts are readable and refer to nothing outside the supported files.

    Raises:
        BaseModelError: naming file and cause.
    """
    for name, reason in _FOREIGN.items():
        if _is_file(folder / name):
            raise BaseModelError(
                f"Base model {folder} has {name}: {reason}. If the folder is a base model, move this file "
                "elsewhere. To name an adapter, set init_adapter to its path or version."
            )
    for path in side_files(folder):
        if path.suffix == ".json":
            _check_json(folder, path)
        elif path.suffix in (".jinja", ".txt"):
            try:
                path.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise BaseModelError(f"{path} is not UTF-8 (byte {error.start}). Fetch the file again.") from error


def _check_json(folder: Path, path: Path) -> None:
    for key, value in _entries(read_settings(path)):
        # An attention given as owner/name is compiled code that transformers downloads from a hub.
        is_hub_kernel = key in _ATTENTION_KEYS and "/" in str(value)
        if path.name in ("tokenizer.json", "vocab.json", "added_tokens.json"):  # there, keys are tokens
            continue
        if is_hub_kernel or (key in _CODE_KEYS and value is not None):
            raise BaseModelError(
                f"Base model {folder} asks for its own code ({key} in {path.name}), which is never run here. "
                "Use a checkpoint of its plain architecture."
            )
        if key in _LEADING_KEYS and value is not None:
            raise BaseModelError(
                f"Base model {folder} is not plain: {key} in {path.name} {_LEADING_KEYS[key]}, which is not supported. "
                "Use a checkpoint of its plain architecture in bfloat16, float16 or float32."
            )


def read_settings(path: Path) -> dict[str, Any]:
    """The JSON object in one of the files.

    Raises:
        FileNotFoundError: if there is no such file.
        BaseModelError: if it is anything else.
    """
    return read_object(path, BaseModelError, "Fetch the model again.")


def _is_file(path: Path) -> bool:
    """Whether a regular file of this name exists, directly or through links.

    Raises:
        BaseModelError: if it is something else: a folder, a FIFO, a device, a broken link.
    """
    if path.is_file():
        return True
    if path.exists():
        raise BaseModelError(f"{path} is {kind_of(path.stat().st_mode)}; expected a regular file. Fetch it again.")
    if path.is_symlink():
        raise BaseModelError(f"{path} is a link to {path.readlink()}, which does not exist. Fetch the model again.")
    return False


def _entries(tree: Any) -> Iterator[tuple[str, Any]]:
    """Every key with its value, at any depth."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield key, value
            yield from _entries(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from _entries(value)
