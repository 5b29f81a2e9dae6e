"""`qwen-vl-lora push`: send an adapter or a merged model to a hub, with its card and record."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from qwen_vl_lora.exceptions import MissingArtifactError
from qwen_vl_lora.hub.repositories import Repository, parse_repository
from qwen_vl_lora.runs.adapters import ADAPTER, TrainedAdapter, trained_adapters
from qwen_vl_lora.runs.records import Record, all_records
from qwen_vl_lora.session.console import project_folder, say
from qwen_vl_lora.session.given_parameters import split_params

MERGED = "merged_model"


@click.command()
@click.argument("what", type=click.Choice(["adapter", "merged"]))
@click.option("--to", "target", required=True, metavar="HUB:OWNER/NAME", help="hf: is Hugging Face, ms: is ModelScope.")
@click.option("--version", default=None, help="Version of the adapter or of the merged model; default: the newest.")
@click.option(
    "--params", default="", callback=split_params, help="As in `kedro run --params`, for example base_model=…"
)
@click.option("--public", is_flag=True, help="Let the repository be public. Without this option it must be private.")
@click.option("--yes", is_flag=True, help="Send. Without this option, only show what would be sent.")
def push(what: str, target: str, version: str | None, params: dict[str, Any], public: bool, yes: bool) -> None:
    """Send an adapter or a merged model to a hub, with its card and the record of its training.

    The newest of all recipes is taken, unless --version names one. Its base must be on this machine: an adapter of
    another base is refused. A repository that does not exist is created; it is private unless --public is given.
    Tokens are read from the environment: HF_TOKEN, MODELSCOPE_API_TOKEN.
    """
    from qwen_vl_lora.hub import pushing
    from qwen_vl_lora.model.adapter import RECORD_FILE

    repository = _target(target)
    project = project_folder()
    records = all_records(project)
    adapters = trained_adapters(records, project)
    if what == "adapter":
        adapter = _newest(adapters, version)
        folder = project / str(adapter.record.written[ADAPTER]["path"])
        files = _files_in(folder)
    else:
        merging = _newest_merge(records, project, version)
        adapter = _adapter_of(merging, adapters)
        folder = project / str(merging.written[MERGED]["path"])
        record_file = project / str(adapter.record.written[ADAPTER]["path"]) / RECORD_FILE
        files = {**_files_in(folder), RECORD_FILE: record_file}
    _check_base(adapter, params)
    kind = "public" if public else "private"
    which = f"adapter {adapter.version} of recipe {adapter.record.recipe}, {adapter.measured}"
    say(f"{folder.relative_to(project)}: {which}")
    say(f"{'to' if yes else 'would go to'} {repository} on {pushing.endpoint_of(repository)}, {kind}:")
    for name, path in files.items():
        say(f"{path.stat().st_size:>15,} bytes  {name}")
    if not yes:
        say("Nothing was sent. Add --yes to send.")
        return
    message = f"{'Adapter' if what == 'adapter' else 'Merged model'} of run {adapter.record.id}"
    pushing.push(repository, files, public=public, message=message)
    say(f"Sent to {repository}.")


def _target(text: str) -> Repository:
    repository = parse_repository("model", text) if text.startswith(("hf:", "ms:")) else None
    if repository is None:
        raise click.BadParameter(f"expected hf:owner/name or ms:owner/name; got {text!r}.", param_hint="--to")
    return repository


def _newest(adapters: Sequence[TrainedAdapter], version: str | None) -> TrainedAdapter:
    found = [adapter for adapter in adapters if version in (None, adapter.version)]
    if not found:
        known = ", ".join(adapter.version for adapter in adapters[-5:])
        raise MissingArtifactError(
            f"No adapter {version or 'at all'} was trained in this project. Versions: {known or 'none'}. Train one: "
            "kedro run."
        )
    return found[-1]


def _newest_merge(records: Sequence[Record], project: Path, version: str | None) -> Record:
    """Return the record of the run that wrote the merged model."""
    written = {record.complete_versions().get(MERGED): record for record in records}
    there = {
        name: record
        for name, record in written.items()
        if name is not None and (project / str(record.written[MERGED]["path"])).is_dir()
    }
    if not there or (version is not None and version not in there):
        raise MissingArtifactError(
            f"No merged model {version or 'at all'} was exported in this project. Versions: "
            f"{', '.join(there) or 'none'}. Export one: kedro run --pipeline export."
        )
    return there[version] if version is not None else list(there.values())[-1]


def _adapter_of(merging: Record, adapters: Sequence[TrainedAdapter]) -> TrainedAdapter:
    version = {**merging.read_versions(), **merging.complete_versions()}.get(ADAPTER)
    for adapter in adapters:
        if (adapter.record.recipe, adapter.version) == (merging.recipe, version):
            return adapter
    raise MissingArtifactError(
        f"Run {merging.id} merged adapter {version} of recipe {merging.recipe}, which is no longer in this project, "
        "so its record cannot go along. Export a newer adapter: kedro run --pipeline export."
    )


def _check_base(adapter: TrainedAdapter, params: dict[str, Any]) -> None:
    """Refuse an adapter whose record names another base than the one that is configured. Downloads nothing.

    Raises:
        AdapterError: naming both bases.
        MissingArtifactError: if the base is not on this machine.
    """
    from kedro.framework.session import KedroSession

    facts = adapter.record.facts
    given = {name: value for name, value in facts.get("runtime_params", {}).items() if name == "base_model"}
    settings = {**given, **params, "recipe": adapter.record.recipe}
    with KedroSession.create(env=facts.get("env"), runtime_params=settings) as session:
        assert isinstance(session, KedroSession)
        catalog: Any = session.load_context()._get_catalog(load_versions={ADAPTER: adapter.version})
        base = catalog["base_model"]
        if not base.exists():
            raise MissingArtifactError(
                f"Base model {base._describe()['model']} is not on this machine, so the adapter cannot be "
                "compared with it. Start a run that needs it, which downloads it, or name its folder: "
                '--params "base_model=path".'
            )
        catalog[ADAPTER].load().check_base(base.load())


def _files_in(folder: Path) -> dict[str, Path]:
    paths = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    return {path.name: path for path in paths}
