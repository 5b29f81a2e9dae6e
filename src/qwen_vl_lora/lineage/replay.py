"""The configuration of a run, stored so that it can be run again, and the check of one that came from elsewhere.

A stored configuration is resolved: it holds values only. One that is not the project's own `conf/` is refused
where it could do more than give values: name a class to import, read the environment, or write outside `data/`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from qwen_vl_lora.exceptions import ParameterError
from qwen_vl_lora.lineage.masking import MASK, mask_tree
from qwen_vl_lora.lineage.records import CONFIGURATION, REPLAY_FILE, Record

_READ_ONLY_ENTRIES = frozenset({"captioned_images", "base_model"})
_CONFIG_SUFFIXES = frozenset({".yml", ".yaml", ".json"})
_CLASS_KEYS = ("type", "dataset")
_FILTERS = ("tags", "node_names", "from_nodes", "to_nodes", "from_inputs", "to_outputs", "namespaces")


def stored_configuration(
    catalog: Mapping[str, Any], parameters: Mapping[str, Any], shared: Mapping[str, Any], replay: Mapping[str, Any]
) -> dict[str, str]:
    """File name → text of everything in a run's folder but its record.

    Args:
        catalog, parameters: resolved, paths as the configuration gives them.
        shared: `recipe` and `base_model`, which globals.yml holds.
        replay: what `kedro run --config` is told.
    """
    base = f"{CONFIGURATION}/base"
    return {
        f"{base}/catalog.yml": _yaml(_without_secrets(catalog)),
        f"{base}/parameters.yml": _yaml(_without_secrets(parameters)),
        f"{base}/globals.yml": _yaml(dict(shared)),
        REPLAY_FILE: "# kedro run --config <this file>, from the project's folder\n" + _yaml(dict(replay)),
    }


def stored_catalog(record: Record) -> dict[str, Any] | None:
    """The catalog that a run stored, to be compared; None where the record came without its configuration."""
    file = record.folder / CONFIGURATION / "base" / "catalog.yml"
    return comparable_catalog(_read(file)) if file.is_file() else None


def comparable_catalog(catalog: Mapping[str, Any]) -> dict[str, Any]:
    """A catalog as it is stored, without what only Kedro-Viz reads."""
    entries = {name: entry for name, entry in _without_secrets(catalog).items() if isinstance(entry, dict)}
    return {name: {key: entry[key] for key in entry if key != "metadata"} for name, entry in entries.items()}


def replay_options(
    folder: str, pipelines: list[str], free_versions: Mapping[str, str], run_params: Mapping[str, Any]
) -> dict[str, Any]:
    """Content of `replay.yml`: the run's own configuration, and the versions of its free inputs alone.

    Versions of what the run writes itself are never pinned: later nodes would read the old ones.

    Args:
        folder: the run's folder, as seen from the project.
        run_params: Kedro's, for the parts of a pipeline that were asked for.
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
    """A masked value would be taken for a value: its key goes."""
    if isinstance(value, dict):
        return {key: _dropped(part) for key, part in value.items() if part != MASK}
    return [_dropped(part) for part in value] if isinstance(value, list) else value


def _yaml(tree: Mapping[str, Any]) -> str:
    return yaml.dump(dict(tree), Dumper=_PlainDumper, sort_keys=False, allow_unicode=True, width=120)


class _PlainDumper(yaml.SafeDumper):
    """No anchors: the same settings in two entries are written twice."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


@dataclass(frozen=True)
class OwnCatalog:
    """What the project's own catalogs use: dataset types, and keys of entries at any depth."""

    types: frozenset[str]
    keys: frozenset[str]

    @classmethod
    def of(cls, conf: Path) -> OwnCatalog:
        entries = [entry for file in _catalog_files(conf) for entry in _read(file).values()]
        types = {name for entry in entries for name in _class_names(entry)}
        return cls(frozenset(types), frozenset(key for entry in entries for key in _keys(entry)))


def check_foreign_configuration(source: Path, own_conf: Path) -> None:
    """Whether a configuration from outside `conf/` gives values and nothing else.

    Raises:
        ParameterError: naming the file and what it wanted.
    """
    if not source.is_dir():
        raise ParameterError(
            f"--conf-source {source}: a folder is required. Only conf/ and the folders beside replay.yml are read."
        )
    own = OwnCatalog.of(own_conf)
    for file in _config_files(source):
        text = file.read_text(encoding="utf-8")
        if "${" in text:
            raise ParameterError(
                f"{file} holds an interpolation (${{…}}). A configuration from outside conf/ may give values only, so "
                "that it cannot read the environment. Put it into conf/<name>/ and use --env <name> if you trust it."
            )
    for file in _catalog_files(source):
        for name, entry in _read(file).items():
            _check_entry(f"{file}: {name}", name, entry, own)


def _check_entry(where: str, name: str, entry: Any, own: OwnCatalog) -> None:
    if not isinstance(entry, dict):
        raise ParameterError(f"{where}: a mapping was required, came {type(entry).__name__}.")
    trust = "Add it to conf/<name>/catalog.yml and use --env <name> if you trust it."
    for class_name in _class_names(entry):
        if class_name not in own.types:
            raise ParameterError(f"{where} wants the dataset type {class_name!r}, which conf/ does not use. {trust}")
    for key in _keys(entry):
        if key not in own.keys:
            raise ParameterError(f"{where} has the key {key!r}, which no entry of conf/ has. {trust}")
    if name in _READ_ONLY_ENTRIES:
        return
    for key in ("filepath", "feature_store", "path"):
        if key in entry and not _lies_in_data(str(entry[key])):
            raise ParameterError(f"{where}: {key} must lie below data/, came {entry[key]!r}. {trust}")


def _lies_in_data(path: str) -> bool:
    parts = PurePosixPath(path).parts
    return len(parts) > 1 and parts[0] == "data" and ".." not in parts and "\\" not in path


def _config_files(source: Path) -> list[Path]:
    return sorted(path for path in source.rglob("*") if path.is_file() and path.suffix in _CONFIG_SUFFIXES)


def _catalog_files(source: Path) -> list[Path]:
    """Files that Kedro reads as the catalog: `catalog*`, `catalog*/**` and `**/catalog*`."""
    files = _config_files(source)
    return [file for file in files if any(part.startswith("catalog") for part in file.relative_to(source).parts)]


def _read(file: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ParameterError(f"{file} is no YAML: {error}.") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ParameterError(f"{file}: a mapping of entries was required, came {type(content).__name__}.")
    return content


def _class_names(entry: Any) -> Iterator[str]:
    """Every text below `type`, and below `dataset` where it is one."""
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
