"""`qwen-vl-lora playground`: a page to try adapters on single pictures."""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib.util
import inspect
import os
import socket
import tempfile
import threading
import webbrowser
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qwen_vl_lora.commands import completion
from qwen_vl_lora.commands.caption import NO_ADAPTER, choose, settings_of
from qwen_vl_lora.commands.local_pages import HOST, LocalPages
from qwen_vl_lora.commands.report import evaluated_versions, recorded_catalog
from qwen_vl_lora.exceptions import MissingArtifactError, ParameterError, QwenVLLoraError
from qwen_vl_lora.runs.adapters import ADAPTER, TrainedAdapter, adapter_in_words, trained_adapters
from qwen_vl_lora.runs.records import Record, all_records
from qwen_vl_lora.session.console import project_folder, say
from qwen_vl_lora.session.given_parameters import params_in_words, split_params

if TYPE_CHECKING:
    from qwen_vl_lora.model.adapter import Adapter
    from qwen_vl_lora.model.base_model import BaseModel
    from qwen_vl_lora.playground.tryout import HeldOut, Tryout

SAVED = Path("data/01_raw/playground")


@click.command()
@click.option(
    "--adapter",
    "wanted",
    multiple=True,
    metavar="VERSION|best|none",
    shell_complete=completion.adapters,
    help="Adapter beside the base; twice for two of them. Default: the newest, or the base alone if there is none.",
)
@click.option(
    "--env",
    "-e",
    default=None,
    shell_complete=completion.environments,
    help="Recipe (a folder of conf/); default: that of the adapter.",
)
@click.option("--params", default="", callback=split_params, help="As in `kedro run --params`: base_model=…, device=…")
@click.option(
    "--save-to",
    type=click.Path(path_type=Path, file_okay=False),
    default=SAVED,
    show_default=True,
    help="Folder for captions that are saved in the page.",
)
@click.option("--port", type=click.IntRange(1024, 65535), default=7860, show_default=True, help="Port on this machine.")
@click.option("--browser/--no-browser", default=True, help="Open the page.")
def playground(
    wanted: tuple[str, ...], env: str | None, params: dict[str, Any], save_to: Path, port: int, browser: bool
) -> None:
    """Try adapters on your pictures in the browser, beside the base and beside each other.

    All adapters of the same base can be chosen in the page. Prompt, picture size and decoding begin as in the
    adapter's record. The page answers only the browser of this machine and contacts no other host.
    """
    if len(wanted) > 2:
        raise ParameterError(f"--adapter takes one or two adapters; got {len(wanted)}. The page can switch to others.")
    if importlib.util.find_spec("gradio") is None:
        raise MissingArtifactError(
            'Gradio, which shows the page, is not installed: pip install -e ".[playground]" in the project, or pip '
            'install "gradio>=6".'
        )
    listener = _listen(port)
    project = project_folder()
    records = all_records(project)
    adapters = trained_adapters(records, project)
    tryout, taken = _load(adapters, wanted, env, params, project)
    gc.disable()  # imports leave nothing to collect; a tenth of the start would go into looking for it
    with tempfile.TemporaryDirectory(prefix="playground-") as uploads:
        os.environ["GRADIO_TEMP_DIR"] = uploads
        import uvicorn

        from qwen_vl_lora.playground.corrections import Corrections

        with _no_stub_files():
            from qwen_vl_lora.playground.page import Offer, Playground, serve_with

        known = {one.version: f"{one.version} ({one.record.recipe}, {one.measured})" for one in adapters}
        offers = [Offer(name, known[name]) for name in reversed(list(tryout.adapters))]
        saved = Corrections(project / save_to if save_to == SAVED else save_to)
        held_out = functools.cache(functools.partial(_held_out, records))
        application = serve_with(Playground(tryout, offers, taken, saved, held_out).build())
        address = f"http://{HOST}:{port}/"
        say(f"The playground is at {address} (Ctrl-C to stop)")
        if browser:
            webbrowser.open(address)
        # Streams of open pages would keep the server from ending.
        guarded = LocalPages(application, is_read_only=False)
        server = uvicorn.Server(uvicorn.Config(guarded, log_level="warning", timeout_graceful_shutdown=1))
        threading.Thread(target=_warm_up, args=(tryout, taken), daemon=True).start()
        server.run(sockets=[listener])


@contextlib.contextmanager
def _no_stub_files() -> Iterator[None]:
    """Keep Gradio from writing type stubs of its components, which takes a third of its import."""
    find = inspect.getfile

    def find_all_but_components(thing: Any) -> str:
        if getattr(thing, "__module__", "").startswith("gradio."):
            raise OSError  # as a component without a file, which gets no stub
        return find(thing)

    inspect.getfile = find_all_but_components  # type: ignore[assignment]
    try:
        yield
    finally:
        inspect.getfile = find


def _warm_up(tryout: Tryout, names: Sequence[str]) -> None:
    """Load the models. The page is served meanwhile, so it does not wait for torch and transformers."""
    tryout.warm_up(names)
    gc.enable()


def _listen(port: int) -> socket.socket:
    """Raises: ParameterError if another program has the port."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((HOST, port))
    except OSError as error:
        listener.close()
        raise ParameterError(f"Port {port} is in use: {error.strerror}. Give another one: --port 7861.") from error
    return listener


def _load(
    adapters: Sequence[TrainedAdapter],
    wanted: Sequence[str],
    env: str | None,
    params: Mapping[str, Any],
    project: Path,
) -> tuple[Tryout, list[str]]:
    """The base with all its adapters, and the names of those that are shown first."""
    from kedro.framework.session import KedroSession

    from qwen_vl_lora.parameters import validate_parameters
    from qwen_vl_lora.playground.tryout import Tryout

    words = params_in_words({name: value for name, value in params.items() if name != "recipe"})
    taken = _taken(adapters, wanted, env, params)
    if taken and env is None and "recipe" not in params:
        env, params, _ = settings_of(taken[0], dict(params))
    with KedroSession.create(env=env, runtime_params=dict(params)) as session:
        assert isinstance(session, KedroSession)
        context = session.load_context()
        settings = validate_parameters(dict(context.params))
        base_model = context._get_catalog()["base_model"].load()
        of_base = {name: params[name] for name in ("recipe", "base_model") if name in params}
        if of_base.get("recipe") == context.config_loader["globals"]["recipe"]:
            del of_base["recipe"]
    fitting = _fitting(adapters, base_model, project)
    for one in taken:
        if one.version not in fitting:
            raise MissingArtifactError(
                f"Adapter {one.version} was not trained on the base model {base_model.name}. Give the base by "
                '--params "base_model=…", or another adapter; `qwen-vl-lora runs` lists them.'
            )
        say(adapter_in_words(one.record.recipe, one.version, adapters, "shown first", "--adapter best"), err=True)
    options = [] if env is None else ["--env", env]
    tryout = Tryout(base_model, fitting, settings, words, options, params_in_words(of_base))
    return tryout, [one.version for one in taken]


def _taken(
    adapters: Sequence[TrainedAdapter], wanted: Sequence[str], env: str | None, params: Mapping[str, Any]
) -> list[TrainedAdapter]:
    """The adapters that are shown first, each once."""
    recipe = params.get("recipe")
    own = [
        one for one in adapters if recipe in (None, one.record.recipe) and env in (None, one.record.facts.get("env"))
    ]
    found = []
    for name in wanted or (None,):
        one = choose(own, name)
        if one is None and name not in (None, NO_ADAPTER):
            raise MissingArtifactError(f"Adapter {name} not found. `qwen-vl-lora runs` lists the versions.")
        found += [one] if one is not None and one not in found else []
    return found


def _fitting(adapters: Sequence[TrainedAdapter], base_model: BaseModel, project: Path) -> dict[str, Adapter]:
    """The adapters that were trained on this base, by version, the oldest first."""
    from qwen_vl_lora.model.adapter import Adapter

    found = {}
    for one in adapters:
        adapter = Adapter(project / str(one.record.written[ADAPTER]["path"]))
        try:
            fits = adapter.record["base_model"]["fingerprint"] == base_model.fingerprint
        except QwenVLLoraError as error:
            say(f"Left out: {error}", err=True)
            continue
        if fits:
            found[one.version] = adapter
    return found


def _held_out(records: Sequence[Record], version: str) -> list[HeldOut]:
    """The pictures of the newest evaluation of an adapter; empty without one."""
    from qwen_vl_lora.playground.tryout import read_held_out

    for record in reversed(records):
        if {**record.read_versions(), **record.complete_versions()}.get(ADAPTER) != version:
            continue
        try:
            catalog = recorded_catalog(record, evaluated_versions(record))
        except MissingArtifactError:  # it trained or captioned only
            continue
        return read_held_out(*(catalog[name].load() for name in ("predictions", "caption_scores", "images")))
    return []
