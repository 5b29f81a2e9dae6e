"""Checks the configuration of a session: names are valid, and files from elsewhere give values only.

The checks run on what Kedro's loader resolved, before any dataset is created.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kedro.config import AbstractConfigLoader
from kedro.framework.context import KedroContext

from qwen_vl_lora.exceptions import ParameterError
from qwen_vl_lora.names import check_name
from qwen_vl_lora.parameter_groups import nearest
from qwen_vl_lora.runs import foreign
from qwen_vl_lora.runs.records import CONFIGURATION, REPLAY_FILE, in_todays_names, is_of_project
from qwen_vl_lora.runs.replay import (
    OwnCatalog,
    check_entries,
    check_foreign_configuration,
    own_bases,
    own_parameters,
)
from qwen_vl_lora.session.packaged import own_configuration
from qwen_vl_lora.tracking.choice import OPENINGS

logger = logging.getLogger(__name__)

OPTION_NAMES = ("env", "pipeline", "pipelines")
RUNNERS = ("SequentialRunner", "ThreadRunner")
_FLAGS = ("is_async", "only_missing_outputs")
_TREES = ("params", "runner_params")
_NEVER_FROM_A_FILE = ("allow_path", "trust", "config")


def check_configuration(context: KedroContext) -> None:
    """Refuse a session with invalid names, or whose values from elsewhere do more than the user allowed.

    Raises:
        ParameterError: naming the value and its place.
    """
    loader, project = context.config_loader, Path(context.project_path)
    source = Path(loader.conf_source)
    own = own_configuration(source, project)
    is_foreign = source.resolve() != own.resolve()
    _check_environment(context.env, source)
    if is_foreign:
        check_foreign_configuration(source, own, project)
        _translate(loader, source)
    parameters, shared = dict(loader["parameters"]), dict(loader["globals"])
    foreign.check_recipe("globals.yml", shared)
    foreign.check_recipe("--params", parameters)
    given, typed = foreign.permissions(), dict(loader.runtime_params or {})
    options = given.options if given.options is not None and not _lies_in(given.options, own) else None
    if not is_foreign and options is None:
        return
    catalog: Mapping[str, Any] = loader["catalog"] if is_foreign else {}
    own_catalog = OwnCatalog.of(own)
    is_sealed = is_foreign and foreign.is_sealed(project, source)
    check_entries(catalog, own_catalog, f"{source}: ", writes_anywhere=is_sealed)
    from_file = typed if options is not None else {}
    if is_foreign and not is_sealed:
        values = parameters if options is not None else _without(parameters, typed)
    else:
        values, catalog = from_file, {}
    baseline = own_parameters(own, "local" if is_foreign else context.env or "local")
    openings = [
        *foreign.openings_of(values, baseline, OPENINGS),
        *foreign.catalog_openings(catalog, own_catalog.entries),
        *foreign.fetched_base(values, catalog, project, own_bases(own)),
        *foreign.fetched_data(values, catalog),
    ]
    outside = foreign.outside_paths(foreign.paths_of(values, catalog), project, given.paths)
    what = f"The configuration {source}" if is_foreign else f"The --config file {options}"
    if outside and any(_is_of_a_run(place, project) for place in (source, options)):
        listed = "; ".join(f"{where}: {foreign.ascii_path(path)}" for where, path in outside.items())
        logger.info("%s reads outside the project: %s.", what, listed)
        outside = {}
    foreign.check_permitted(what, outside, openings)


def _translate(loader: AbstractConfigLoader, source: Path) -> None:
    """Give the parameters that an older version stored the names that they have now."""
    stored = dict(loader["parameters"])
    translated = in_todays_names(stored)
    if translated != stored:
        loader["parameters"] = translated
        logger.info("%s names `launcher`, which is now `cluster`: read as %s.", source, translated["cluster"])


def _check_environment(env: str | None, source: Path) -> None:
    if env is None:
        return
    check_name("--env", env)
    if not source.is_dir() or (source / env).is_dir():
        return
    default = source / "base" / "globals.yml"
    if default.is_file() and foreign.read_values(default).get("recipe") == env:
        raise ParameterError(f"--env names {env!r}, the default recipe, which needs no --env. Omit the option.")
    there = sorted(path.name for path in source.iterdir() if path.is_dir())
    raise ParameterError(
        f"--env names {env!r}, but {source} has no such environment{nearest(env, set(there))}. "
        f"Environments: {', '.join(there)}."
    )


def _is_of_a_run(place: Path | None, project: Path) -> bool:
    """Whether a configuration or `replay.yml` is in a run folder of this project."""
    named = place is not None and place.name in (CONFIGURATION, REPLAY_FILE)
    return place is not None and named and is_of_project(place.resolve().parent, project)


def _lies_in(file: Path, folder: Path) -> bool:
    return file.resolve().is_relative_to(folder.resolve())


def _without(tree: Mapping[str, Any], typed: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tree without the values given on the command line."""
    kept = {}
    for key, value in tree.items():
        if key not in typed:
            kept[key] = value
        elif isinstance(value, Mapping) and isinstance(typed[key], Mapping):
            kept[key] = _without(value, typed[key])
    return kept


def read_run_options(file: Path, known: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of `kedro run` that a `--config` file gives.

    Args:
        known: names of all options.

    Raises:
        ParameterError: if the file does more than give values to known options.
    """
    tree = foreign.read_values(file)
    options = tree.get("run")
    if set(tree) != {"run"} or not isinstance(options, dict):
        raise ParameterError(
            f"{file}: expected one section `run` with options of kedro run, got {', '.join(tree) or 'nothing'}."
        )
    allowed = {name for name in known if name not in _NEVER_FROM_A_FILE}
    for name, value in options.items():
        if name not in allowed:
            kept = " Give it on the command line." if name in _NEVER_FROM_A_FILE else ""
            raise ParameterError(
                f"{file}: `{name}` is not an option that a file may give{nearest(str(name), allowed)}.{kept} "
                f"Allowed: {', '.join(sorted(allowed))}."
            )
        kinds = bool if name in _FLAGS else (str, dict) if name in _TREES else str
        if value is not None and not isinstance(value, kinds):
            raise ParameterError(
                f"{file}: {name}: expected {'true or false' if name in _FLAGS else 'text, items separated by commas'}, "
                f"got {value!r}."
            )
    runner = options.get("runner")
    if runner is not None and runner not in RUNNERS:
        raise ParameterError(
            f"The --config file names the runner {runner!r}; a file may name only Kedro's own "
            f"({', '.join(RUNNERS)}). Name it on the command line if you trust it: --runner."
        )
    return {name: value for name, value in options.items() if value is not None}


def check_option_names(options: Mapping[str, Any]) -> None:
    """Check that options of `kedro run` that name something are valid names, wherever they were given.

    Raises:
        ParameterError: naming the option.
    """
    for option, name in _named(options):
        check_name(f"--{option}", name)


def _named(options: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for option in OPTION_NAMES:
        value = options.get(option)
        for name in value if isinstance(value, (list, tuple)) else [value] if value is not None else []:
            yield option, name
    for dataset, version in (options.get("load_versions") or {}).items():
        yield f"load-versions {dataset}", version
