"""Stores the configuration of a run so that it can be repeated, and checks configurations from elsewhere.

A stored configuration is resolved: it holds values only. A configuration other than the project's `conf/` is refused
if it could do more than give values: name a class to import, read the environment, or write outside `data/`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from qwen_vl_lora.exceptions import ParameterError
from qwen_vl_lora.runs.foreign import (
    CREDENTIALS,
    PATH_KEYS,
    READ_ONLY_ENTRIES,
    check_recipe,
    is_sealed,
    leaves,
    read_values,
    value_at,
    without_interpolations,
    without_metadata,
)
from qwen_vl_lora.runs.masking import MASK, mask_tree
from qwen_vl_lora.runs.records import CONFIGURATION, REPLAY_FILE, Record

_CONFIG_SUFFIXES = frozenset({".yml", ".yaml", ".json"})
_CLASS_KEYS = ("type", "dataset")
_FILTERS = ("tags", "node_names", "from_nodes", "to_nodes", "from_inputs", "to_outputs", "namespaces")


def stored_configuration(
    catalog: Mapping[str, Any], parameters: Mapping[str, Any], shared: Mapping[str, Any], replay: Mapping[str, Any]
) -> dict[str, str]:
    """Return file name → text of everything in a run folder except its record.

    Args:
        catalog, parameters: resolved; paths as the configuration gives them.
        shared: `recipe` and `base_model`, which globals.yml holds.
        replay: options for `kedro run --config`.
    """
    base = f"{CONFIGURATION}/base"
    return {
        f"{base}/catalog.yml": _yaml(without_interpolations(_without_secrets(catalog))),
        f"{base}/parameters.yml": _yaml(without_interpolations(_without_secrets(parameters))),
        f"{base}/globals.yml": _yaml(without_interpolations(_without_secrets(shared))),
        REPLAY_FILE: "# kedro run --config <this file>, in the project folder\n" + _yaml(dict(replay)),
    }


def stored_catalog(record: Record) -> dict[str, Any] | None:
    """Return the catalog that a run stored, for comparison; None if the record has no configuration."""
    file = record.folder / CONFIGURATION / "base" / "catalog.yml"
    return comparable_catalog(read_values(file)) if file.is_file() else None


def comparable_catalog(catalog: Mapping[str, Any]) -> dict[str, Any]:
    """Return a catalog as it is stored, without the keys that only Kedro-Viz reads."""
    entries = {name: entry for name, entry in _without_secrets(catalog).items() if isinstance(entry, dict)}
    return {name: without_metadata(entry) for name, entry in entries.items()}


def replay_options(
    folder: str, pipelines: list[str], free_versions: Mapping[str, str], run_params: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the content of `replay.yml`: the run's own configuration, and the versions of its free inputs only.

    Versions that the run writes are never pinned, because later nodes would read the old ones.

    Args:
        folder: the run folder, relative to the project.
        run_params: Kedro's run parameters, for the selected parts of a pipeline.
    """
    options: dict[str, Any] = {"conf_source": f"{folder}/{CONFIGURATION}", "env": "base"}
    if pipelines:
        options["pipelines"] = ",".join(pipelines)
    if free_versions:
        options["load_versions"] = ",".join(f"{name}:{version}" for name, version in free_versions.items())
    options |= {name: ",".join(run_params[name]) for name in _FILTERS if run_params.get(name)}
    return {"run": options}


def _without_secrets(tree: Mapping[str, Any]) -> dict[str, Any]:
    masked: dict[str, Any] = _dropped(mask_tree(tree))
    return masked


def _dropped(value: Any) -> Any:
    """Remove keys with masked values, because a mask would be read as a value."""
    if isinstance(value, dict):
        return {key: _dropped(part) for key, part in value.items() if part != MASK}
    return [_dropped(part) for part in value] if isinstance(value, list) else value


def _yaml(tree: Mapping[str, Any]) -> str:
    return yaml.dump(dict(tree), Dumper=_PlainDumper, sort_keys=False, allow_unicode=True, width=120)


class _PlainDumper(yaml.SafeDumper):
    """Write YAML without anchors: equal parts of two entries are written twice."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


@dataclass(frozen=True)
class OwnCatalog:
    """Dataset types, keys of entries at any depth, and the entries of the project's own catalogs."""

    types: frozenset[str]
    keys: frozenset[str]
    entries: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def of(cls, conf: Path) -> OwnCatalog:
        entries = [entry for file in _files_of(conf, "catalog") for entry in _read(file).values()]
        types = {name for entry in entries for name in _class_names(entry)}
        keys = {key for entry in entries for key in _keys(entry)}
        plain = [without_metadata(entry) for entry in entries if isinstance(entry, dict)]
        return cls(frozenset(types), frozenset(keys), plain)


def own_parameters(conf: Path, env: str) -> dict[str, Any]:
    """Return the parameters of `conf/base` and one environment, as written there."""
    tree: dict[str, Any] = {}
    for folder in dict.fromkeys((conf / "base", conf / env)):
        for file in _files_of(folder, "parameters"):
            tree = _merged(tree, _read(file))
    return tree


def own_bases(conf: Path) -> set[str]:
    """Return the base models that the project's globals.yml files name; with `hub: huggingface`, also as `hf:…`.

    A name without a revision counts as `@master` too, as older versions wrote it.
    """
    shared = [_read(file) for file in _config_files(conf) if file.name == "globals.yml"]
    named = {name for tree in shared if isinstance(name := value_at(tree, "base_model"), str)}
    named |= {f"{name}@master" for name in named if "@" not in name}
    if any(value_at(tree, "hub") == "huggingface" for tree in shared):
        named |= {f"hf:{name}" for name in named}
    return named


def _merged(one: dict[str, Any], two: Mapping[str, Any]) -> dict[str, Any]:
    both = {key: _merged(one[key], two[key]) for key in two if isinstance(one.get(key), dict) and two[key]}
    return {**one, **two, **both}


def check_foreign_configuration(source: Path, own_conf: Path, project: Path | None = None) -> None:
    """Whether a configuration from outside `conf/` gives values and nothing else, file by file.

    Args:
        project: what its own runs stored may write where those runs did; None is no project.

    Raises:
        ParameterError: naming the file and what it contains.
    """
    if not source.is_dir():
        raise ParameterError(
            f"--conf-source {source}: expected a folder. Only conf/ and the folders beside replay.yml are read."
        )
    for path in source.rglob("*"):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise ParameterError(
                f"{path} is not a plain file. A configuration from outside conf/ may not contain links."
            )
    values = {file: read_values(file) for file in _config_files(source)}
    for file in _files_of(source, CREDENTIALS):
        raise ParameterError(f"{file} contains credentials, which a configuration from outside conf/ may not.")
    for file, tree in values.items():
        if file.name.startswith(("globals", "parameters")):
            check_recipe(str(file), tree)
    own, is_own = OwnCatalog.of(own_conf), project is not None and is_sealed(project, source)
    for file in _files_of(source, "catalog"):
        check_entries(values[file], own, f"{file}: ", writes_anywhere=is_own)


def check_entries(catalog: Mapping[str, Any], own: OwnCatalog, where: str, *, writes_anywhere: bool) -> None:
    """Whether catalog entries use the types and keys of the project's own, and write below `data/` only.

    Args:
        writes_anywhere: let them write elsewhere too.

    Raises:
        ParameterError: naming the entry and the fault.
    """
    for name, entry in catalog.items():
        _check_entry(f"{where}{name}", name, entry, own, writes_anywhere)


def _check_entry(where: str, name: str, entry: Any, own: OwnCatalog, writes_anywhere: bool) -> None:
    if not isinstance(entry, dict):
        raise ParameterError(f"{where}: expected a mapping, got {type(entry).__name__}.")
    trust = "If you trust it, add it to conf/<name>/catalog.yml and use --env <name>."
    for class_name in _class_names(entry):
        if class_name not in own.types:
            raise ParameterError(f"{where} uses the dataset type {class_name!r}, which conf/ does not use. {trust}")
    for key in _keys(entry):
        if key not in own.keys:
            raise ParameterError(f"{where} has the key {key!r}, which no entry of conf/ has. {trust}")
    for path, value in leaves(entry):
        if path[:1] == ("metadata",) or not PATH_KEYS.intersection(path):
            continue
        key = ".".join(map(str, path))
        if name in READ_ONLY_ENTRIES:
            if value is not None and not _is_of_a_source(path, value):
                raise ParameterError(f"{where}: {key} must be a path on this machine, got {value!r}. {trust}")
        elif not writes_anywhere and not (path[-1] in PATH_KEYS and isinstance(value, str) and _lies_in_data(value)):
            raise ParameterError(f"{where}: {key} must lie below data/, got {value!r}. {trust}")


def _is_of_a_source(path: Sequence[Any], value: Any) -> bool:
    """Whether this is a path on this machine, possibly in a list of sources, or another key of such a list."""
    named = next(part for part in reversed(path) if isinstance(part, str))
    if named in ("name", "num_rows") and isinstance(path[-2], int):
        return True
    return named in PATH_KEYS and isinstance(value, str) and _is_local(value)


def _is_local(path: str) -> bool:
    return "::" not in path and "://" not in path and "\0" not in path


def _lies_in_data(path: str) -> bool:
    parts = PurePosixPath(path).parts
    inside = len(parts) > 1 and parts[0] == "data" and ".." not in parts
    return inside and _is_local(path) and "\\" not in path and "/~" not in path


def _config_files(source: Path) -> list[Path]:
    return sorted(path for path in source.rglob("*") if path.is_file() and path.suffix in _CONFIG_SUFFIXES)


def _files_of(source: Path, kind: str) -> list[Path]:
    """Return files that Kedro reads for a kind, for the catalog: `catalog*`, `catalog*/**` and `**/catalog*`."""
    files = _config_files(source)
    return [file for file in files if any(part.startswith(kind) for part in file.relative_to(source).parts)]


def _read(file: Path) -> dict[str, Any]:
    """Read one of the project's own files, which may contain anything that Kedro accepts."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ParameterError(f"{file} is not valid YAML: {error}.") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ParameterError(f"{file}: expected a mapping of entries, got {type(content).__name__}.")
    return content


def _class_names(entry: Any) -> Iterator[str]:
    """Yield every text below `type`, and below `dataset` where that is a text."""
    if isinstance(entry, dict):
        for key, value in entry.items():
            if key in _CLASS_KEYS and not isinstance(value, (dict, list)):
                yield str(value)
            else:
                yield from _class_names(value)
    elif isinstance(entry, list):
        for part in entry:
            yield from _class_names(part)


def _keys(entry: Any) -> Iterator[str]:
    if isinstance(entry, dict):
        for key, value in entry.items():
            yield str(key)
            yield from _keys(value)
    elif isinstance(entry, list):
        for part in entry:
            yield from _keys(part)
