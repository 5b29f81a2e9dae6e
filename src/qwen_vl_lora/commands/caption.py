"""`qwen-vl-lora caption`: caption pictures on the command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qwen_vl_lora.commands import completion
from qwen_vl_lora.exceptions import MissingArtifactError
from qwen_vl_lora.runs.adapters import ADAPTER, TrainedAdapter, adapter_in_words, best_adapter, trained_adapters
from qwen_vl_lora.runs.records import all_records
from qwen_vl_lora.session.console import keep_stdout_for_results, project_folder, say
from qwen_vl_lora.session.given_parameters import split_params
from qwen_vl_lora.texts import visible_line

if TYPE_CHECKING:
    from qwen_vl_lora.evaluation.inference import Captioner
    from qwen_vl_lora.evaluation.served import ServedCaptioner
    from qwen_vl_lora.parameters import Parameters
    from qwen_vl_lora.samples.named_pictures import Gathered

NO_ADAPTER, BEST = "none", "best"


@click.command()
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="IMAGE…")
@click.option(
    "--adapter",
    default=None,
    metavar="VERSION|best|none",
    shell_complete=completion.adapters,
    help="Adapter version, or the one with the best CIDEr; default: the newest.",
)
@click.option(
    "--server",
    default=None,
    metavar="ADDRESS",
    help="OpenAI-compatible server that captions in place of a model in this process: http://127.0.0.1:8000/v1",
)
@click.option("--prompt", default=None, help="Question to ask instead of the trained one.")
@click.option(
    "--system",
    default=None,
    help="System text instead of the trained one; an empty text selects the chat template's own.",
)
@click.option(
    "--env",
    "-e",
    default=None,
    shell_complete=completion.environments,
    help="Recipe (a folder of conf/); default: that of the adapter.",
)
@click.option("--params", default="", callback=split_params, help="As in `kedro run --params`, for example device=cpu.")
def caption(
    images: tuple[Path, ...],
    adapter: str | None,
    server: str | None,
    prompt: str | None,
    system: str | None,
    env: str | None,
    params: dict[str, Any],
) -> None:
    """Caption each IMAGE: pictures, folders, or CSV files with the column image_path.

    The newest adapter of all recipes is used, or the newest of the recipe that --env names; a line on standard error
    names it. Prompt, image size and decoding are read from its record, unless --params gives `image.*` or
    `generation.*`. An adapter that was trained with several questions needs --prompt; `<image>` in the prompt places
    the picture there instead of before the text. With `--adapter none` the base model answers alone, with the
    configured prompt and image size. With --server the adapter gives the settings and the server the captions;
    --params "inference.server.model=…" names its model.
    """
    keep_stdout_for_results()
    from kedro.framework.session import KedroSession

    from qwen_vl_lora.parameters import validate_parameters
    from qwen_vl_lora.samples.named_pictures import gather_pictures

    if server is not None:
        params = _with_server(params, server)
    project = project_folder()
    adapters = trained_adapters(all_records(project), project)
    wanted = adapter
    if env is None and "recipe" not in params and (chosen := choose(adapters, adapter)) is not None:
        env, params, adapter = settings_of(chosen, params)
    with KedroSession.create(env=env, runtime_params=params) as session:
        assert isinstance(session, KedroSession)
        context = session.load_context()
        parameters = validate_parameters(dict(context.params))
        gathered = gather_pictures(images, parameters.image, recursive=False)
        recipe = parameters.recipe or context.config_loader["globals"]["recipe"]
        if adapter == BEST:
            adapter = _best_of(recipe, adapters).version
        catalog: Any = context._get_catalog(load_versions={} if adapter in (None, NO_ADAPTER) else {ADAPTER: adapter})
        if adapter != NO_ADAPTER:
            catalog[ADAPTER].existing_path()
            version, why = catalog[ADAPTER].resolve_load_version(), _reason(wanted, recipe, is_free=adapter != wanted)
            say(adapter_in_words(recipe, version, adapters, why, "--adapter best"), err=True)
        asked = (prompt, system)
        captioner = _load_captioner(catalog, parameters, params, with_adapter=adapter != NO_ADAPTER, asked=asked)
    _write(captioner, gathered)


def choose(adapters: Sequence[TrainedAdapter], wanted: str | None) -> TrainedAdapter | None:
    """Return the adapter that `--adapter` means where no recipe is given; None if there is none, or none is wanted.

    The best one is sought among those of the newest one's recipe: scores on other pictures do not compare.
    """
    if not adapters or wanted is None:
        return adapters[-1] if adapters else None
    if wanted == BEST:
        return _best_of(adapters[-1].record.recipe, adapters)
    return next((one for one in reversed(adapters) if one.version == wanted), None)


def _with_server(params: dict[str, Any], address: str) -> dict[str, Any]:
    """The parameters with `inference.server.address`."""
    inference = params.get("inference", {})
    return {**params, "inference": {**inference, "server": {**inference.get("server", {}), "address": address}}}


def settings_of(chosen: TrainedAdapter, params: dict[str, Any]) -> tuple[str | None, dict[str, Any], str]:
    """Return environment, parameters and version with which the catalog finds the adapter and its base."""
    facts = chosen.record.facts
    given = {name: value for name, value in facts.get("runtime_params", {}).items() if name == "base_model"}
    return facts.get("env"), {**given, "recipe": chosen.record.recipe, **params}, chosen.version


def _best_of(recipe: str, adapters: Sequence[TrainedAdapter]) -> TrainedAdapter:
    best = best_adapter([one for one in adapters if one.record.recipe == recipe])
    if best is None:
        raise MissingArtifactError(
            f"No adapter of recipe {recipe} was evaluated, so none is the best. Evaluate one (kedro run --pipeline "
            "evaluation), or omit --adapter to take the newest."
        )
    return best


def _reason(wanted: str | None, recipe: str, *, is_free: bool) -> str:
    if wanted == BEST:
        return f"the best evaluated of recipe {recipe}"
    if wanted is not None:
        return "named by --adapter"
    return "the newest of all recipes" if is_free else f"the newest of recipe {recipe}"


def _load_captioner(
    catalog: Any,
    parameters: Parameters,
    given: Mapping[str, Any],
    *,
    with_adapter: bool,
    asked: tuple[str | None, str | None],
) -> Captioner | ServedCaptioner:
    from qwen_vl_lora.evaluation.inference import choose_captioner
    from qwen_vl_lora.evaluation.settings import asking, asking_as_trained, changed

    base_model = catalog["base_model"].load()
    adapter = catalog[ADAPTER].load() if with_adapter else None
    settings = asking(parameters, *asked) if adapter is None else asking_as_trained(adapter, parameters, *asked)
    return choose_captioner(base_model, adapter, changed(settings, given))


def _write(captioner: Captioner | ServedCaptioner, gathered: Gathered) -> None:
    captions = dict(zip(gathered.usable, captioner.caption(gathered.images, gathered.usable), strict=True))
    for picture in gathered.named:
        if picture.sha256 is not None:
            caption = captions[picture.sha256]
            if caption.reason:
                say(f"{visible_line(picture.path)}: {caption.reason}", err=True)
                continue
            text = caption.text
            say(text if len(gathered.named) == 1 else f"{visible_line(picture.path)}: {visible_line(text)}")
            if caption.is_cut:
                limit = captioner.settings.generation.max_new_tokens
                cut = f"the caption was cut after {limit} tokens (generation.max_new_tokens)"
                say(f"{visible_line(picture.path)}: {cut}", err=True)
        else:
            say(f"{visible_line(picture.path)}: {picture.reason}", err=True)
    if all(caption.reason for caption in captions.values()):
        raise SystemExit(1)
