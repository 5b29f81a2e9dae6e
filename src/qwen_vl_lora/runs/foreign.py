"""Files written elsewhere that are read here: configurations, options of a run, parameters.

Such a file may give values and nothing else. What its values would read outside the project, or open to the network,
is listed and refused until the user allows it on the command line.
"""

from __future__ import annotations

import hashlib
import hmac
import io
import logging
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from qwen_vl_lora.exceptions import ParameterError
from qwen_vl_lora.names import check_name
from qwen_vl_lora.runs.records import REPORTING
from qwen_vl_lora.runs.storage import make_folder, write_whole

logger = logging.getLogger(__name__)

CREDENTIALS = "credentials"
SEAL_FILE = "seal"
SOURCE_ENTRY = "captioned_images"
READ_ONLY_ENTRIES = frozenset({SOURCE_ENTRY, "base_model"})
"""Catalog entries that no pipeline writes. They may be outside the project."""

PATH_KEYS = frozenset({"filepath", "path", "model", "feature_store", "image_folder", "filename", "folder"})

_MAX_DEPTH = 50
_KEY_FILE = Path(REPORTING, ".seal_key")
_INTERPOLATION = re.compile(r"(?<!\\)(?:\\\\)*\$\{")
_CLIP = "evaluation.clip_score"
_PATH_PARAMETERS = (
    "base_model",
    "captions_file",
    "image_folder",
    "init_adapter",
    "inference.images",
    _CLIP,
    "resume",
)
_NO_PATHS = {"resume": ("auto", "never")}
_OPENINGS = (
    "image.allow_urls",
    "image.url_hosts",
    "image.allowed_roots",
    "image.more_formats",
    "cluster.address",
    "inference.server.address",
    "evaluation.judge.address",
    "inference.output.sidecars",
    "inference.output.jsonl",
    "inference.output.parquet",
)
"""Parameters that fetch pictures or models, read further files and formats, write files, or send work to others."""

_CATALOG_OPENINGS = frozenset({"trust_remote_code", "image_hosts"})
_HUB_NAME = re.compile(r"((hf|ms):)?[\w.-]+/[\w.-]+(@.+)?")


@dataclass(frozen=True)
class Permissions:
    """What the user allows files from elsewhere to do. Set on the command line only.

    Attributes:
        paths: folders and files outside the project that may be read.
        trust: whether values that open the machine to the network or to further folders are allowed.
        options: the `--config` file whose `params` the run uses, or None.
    """

    paths: tuple[Path, ...] = ()
    trust: bool = False
    options: Path | None = None


_permissions = Permissions()


def permit(permissions: Permissions) -> None:
    """Set what the command of this process allows."""
    global _permissions
    _permissions = permissions


def permissions() -> Permissions:
    """Return what the user allows; nothing unless a command set it."""
    return _permissions


def read_values(file: Path) -> dict[str, Any]:
    """Return the mapping in a YAML or JSON file, as Kedro's loader reads it, if it holds values only.

    Raises:
        ParameterError: naming the file and what else it holds.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        text = file.read_text(encoding="utf-8")
        _require_plain_yaml(file, text)
        loaded = OmegaConf.load(io.StringIO(text))
        check_values(file, OmegaConf.to_container(loaded, resolve=False))
        tree: Any = OmegaConf.to_container(loaded, resolve=True)
    except ParameterError:
        raise
    except OmegaConfBaseException as error:
        raise ParameterError(f"{_holds_an_interpolation(file)} ({str(error).splitlines()[0]})") from error
    except (yaml.YAMLError, OSError, ValueError, RecursionError) as error:
        raise ParameterError(f"{file} is not valid YAML: {error}.") from error
    if tree is not None and not isinstance(tree, dict):
        raise ParameterError(f"{file}: expected a mapping of entries, got {type(tree).__name__}.")
    return {str(key): value for key, value in (tree or {}).items()}


def _require_plain_yaml(file: Path, text: str) -> None:
    depth = 0
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _MAX_DEPTH:
            raise ParameterError(f"{file} is nested deeper than {_MAX_DEPTH} levels.")
        if isinstance(event, yaml.AliasEvent):
            raise ParameterError(f"{file} contains a YAML alias (*name). Write the value at each place.")


def check_values(file: Path, tree: Any) -> None:
    """Check that a parsed tree holds plain values and no interpolation.

    Raises:
        ParameterError: if not.
    """
    for path, value in leaves(tree):
        if any(isinstance(text, str) and _INTERPOLATION.search(text) for text in (*path, value)):
            raise ParameterError(_holds_an_interpolation(file))
        if not isinstance(value, (str, int, float, bool, type(None), dict, list)):
            raise ParameterError(f"{file}: {_dotted(path)} holds a {type(value).__name__}; expected text or a number.")


def _holds_an_interpolation(file: Path) -> str:
    return (
        f"{file} contains an interpolation (${{…}}). A file from outside conf/ may give values only, so that it cannot "
        "read the environment. If you trust it, put it into conf/<name>/ and use --env <name>."
    )


def without_interpolations(value: Any) -> Any:
    """Escape the tree so that reading it back gives the same texts: `${` in a text stays text."""
    if isinstance(value, Mapping):
        return {key: without_interpolations(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_interpolations(part) for part in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def leaves(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yield every leaf of a tree: its keys from the top, and its value."""
    parts: Iterable[tuple[Any, Any]] = ()
    if isinstance(tree, Mapping):
        parts = tree.items()
    elif isinstance(tree, list):
        parts = enumerate(tree)
    if not isinstance(tree, (Mapping, list)) or not tree:
        yield path, tree
    for key, value in parts:
        yield from leaves(value, (*path, key))


def _dotted(path: Iterable[Any]) -> str:
    return ".".join(str(part) for part in path)


def value_at(tree: Mapping[str, Any], key: str) -> Any:
    """Return the value under a dotted key; None if there is none."""
    value: Any = tree
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def check_recipe(where: str, tree: Mapping[str, Any]) -> None:
    """Check that the recipe of a tree, if it states one, is a valid name.

    Raises:
        ParameterError: if not.
    """
    if "recipe" in tree:
        check_name(f"{where}: recipe", tree["recipe"])


def paths_of(parameters: Mapping[str, Any], catalog: Mapping[str, Any]) -> dict[str, str]:
    """Return place → path for every path in these values that a run would read."""
    found = {}
    for key in _PATH_PARAMETERS:
        value = value_at(parameters, key)
        if isinstance(value, str) and value not in _NO_PATHS.get(key, ()):
            found[key] = value
    for keys, value in leaves(value_at(parameters, "evaluation.contenders") or []):
        if keys[-1:] in (("adapter",), ("model",)) and len(keys) == 2 and isinstance(value, str):
            found[f"evaluation.contenders.{_dotted(keys)}"] = value
    for name in sorted(READ_ONLY_ENTRIES & catalog.keys()):
        for keys, value in leaves(catalog[name]):
            if PATH_KEYS.intersection(keys) and isinstance(value, str):
                found[f"catalog {name}.{_dotted(keys)}"] = value
    return found


def openings_of(
    parameters: Mapping[str, Any], own: Mapping[str, Any], more: Mapping[str, Callable[[Any], bool]]
) -> list[str]:
    """Return a line such as `image.allow_urls: True` for every parameter that allows more than the project's value.

    Args:
        more: further parameters, each with a function that tells whether a value opens anything.
    """
    found = []
    usual = {**dict.fromkeys(_OPENINGS, _opens), "evaluation.contenders": _asks_servers, _CLIP: _is_of_a_hub}
    for key, opens in {**usual, **more}.items():
        value, ours = value_at(parameters, key), value_at(own, key)
        if isinstance(value, list) and isinstance(ours, list):
            value = [part for part in value if part not in ours]
        if value != ours and opens(value):
            found.append(f"{key}: {value}")
    return found


def _opens(value: Any) -> bool:
    return value not in (None, False, [], 1) or value is True


def _is_of_a_hub(named: Any) -> bool:
    return isinstance(named, str) and named.startswith(("hf:", "ms:"))


def _asks_servers(contenders: Any) -> bool:
    listed = contenders if isinstance(contenders, list) else []
    return any(isinstance(contender, Mapping) and contender.get("server") is not None for contender in listed)


def catalog_openings(catalog: Mapping[str, Any], own_entries: Sequence[Any]) -> list[str]:
    """Do the same for catalog entries that the project's own catalogs lack: code of a hub, further hosts."""
    found = []
    for name, entry in catalog.items():
        plain = without_metadata(entry)
        if plain not in own_entries:
            values = [(key, value) for key, value in leaves(plain) if _CATALOG_OPENINGS.intersection(map(str, key))]
            found += [f"catalog {name}.{_dotted(key)}: {value}" for key, value in values if value not in (None, False)]
    return found


def without_metadata(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return a catalog entry without the keys that only Kedro-Viz reads."""
    return {key: value for key, value in entry.items() if key != "metadata"}


def fetched_base(parameters: Mapping[str, Any], catalog: Mapping[str, Any], project: Path, own: set[str]) -> list[str]:
    """Return a base model that would be downloaded from a hub and that no globals.yml of the project names."""
    named = {value_at(parameters, "base_model"), value_at(catalog, "base_model.model")} - {None}
    fetched = {base for base in map(str, named) if _HUB_NAME.fullmatch(base) and not (project / base).is_dir()}
    if value_at(catalog, "base_model.hub") == "huggingface":
        fetched = {base if base.startswith(("hf:", "ms:")) else f"hf:{base}" for base in fetched}
    return [f"base_model: {base}" for base in sorted(fetched - own)]


def fetched_data(parameters: Mapping[str, Any], catalog: Mapping[str, Any]) -> list[str]:
    """Return data sets that would be downloaded from a hub or from S3."""
    values = [value_at(parameters, "captions_file"), *(value for _, value in leaves(catalog.get(SOURCE_ENTRY, {})))]
    named = {value for value in values if isinstance(value, str) and value.startswith(("hf:", "ms:", "s3:"))}
    return [f"captions_file: {value}" for value in sorted(named)]


def outside_paths(paths: Mapping[str, str], project: Path, allowed: Sequence[Path]) -> dict[str, str]:
    """Return the paths that lead outside the project and the allowed places, with links resolved."""
    roots = [place.resolve() for place in (project, *allowed)]
    return {
        where: path for where, path in paths.items() if not any(_place(path, project).is_relative_to(r) for r in roots)
    }


def _place(path: str, project: Path) -> Path:
    _, home, behind = f"/{path}".rpartition("/~/")  # catalog entries expand ~ anywhere in a path
    try:
        return (project / Path(f"~/{behind}" if home else path).expanduser()).resolve()
    except (OSError, ValueError, RuntimeError):
        return Path("/", path.replace("\0", "�"))


def check_permitted(what: str, outside: Mapping[str, str], openings: Sequence[str]) -> None:
    """Refuse everything that the user did not allow.

    Args:
        what: the file that gave the values, for the message.
        outside: place → path that leads outside the project.
        openings: lines that state what else the values open.

    Raises:
        ParameterError: listing everything, with the options that allow it.
    """
    given = permissions()
    faults = []
    if outside:
        listed = "".join(f"\n  {where}: {ascii_path(path)}" for where, path in outside.items())
        faults.append(f"It reads outside the project:{listed}\nAdd --allow-path PATH for each path that you trust.")
    if openings and not given.trust:
        listed = "".join(f"\n  {line}" for line in openings)
        faults.append(f"It enables what conf/ disables:{listed}\nAdd --trust to allow this.")
    elif openings:
        logger.warning("%s enables, as --trust allows: %s.", what, "; ".join(openings))
    if faults:
        raise ParameterError(f"{what} was not made in this project. " + "\n".join(faults))


def ascii_path(path: str) -> str:
    """Return a path from elsewhere for a message, safe for the terminal."""
    return path if path.isprintable() else ascii(path)


def seal_of(project: Path, configuration: Mapping[str, str]) -> str:
    """Return the seal of a stored configuration, which only this project can compute.

    Args:
        configuration: file name relative to the run's folder → text.
    """
    return _seal(_own_key(project, make=True), {name: text.encode() for name, text in configuration.items()})


def is_sealed(project: Path, source: Path) -> bool:
    """Whether a run of this project stored this configuration, and it has not changed since."""
    file, key = source.parent / SEAL_FILE, _own_key(project, make=False)
    if not key or not file.is_file():
        return False
    parts = {path.relative_to(source.parent).as_posix(): path for path in source.rglob("*") if path.is_file()}
    seal = _seal(key, {name: path.read_bytes() for name, path in parts.items()})
    return hmac.compare_digest(file.read_bytes(), seal.encode())


def _seal(key: bytes, files: Mapping[str, bytes]) -> str:
    digest = hmac.new(key, digestmod=hashlib.sha256)
    for name in sorted(name for name in files if name.startswith("conf/")):
        digest.update(hashlib.sha256(name.encode()).digest() + hashlib.sha256(files[name]).digest())
    return digest.hexdigest()


def _own_key(project: Path, *, make: bool) -> bytes:
    file = project / _KEY_FILE
    if make and not file.is_file():
        make_folder(file.parent)
        write_whole(file, secrets.token_hex(32))
        file.chmod(0o600)
    try:
        return file.read_bytes()
    except OSError:
        return b""
