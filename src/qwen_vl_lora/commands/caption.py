"""`qwen-vl-lora caption`: a picture in, its caption out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qwen_vl_lora.console import keep_stdout_for_results, split_params
from qwen_vl_lora.samples.texts import printable

if TYPE_CHECKING:
    from qwen_vl_lora.parameters import Parameters
    from qwen_vl_lora.samples.named_pictures import Gathered
    from qwen_vl_lora.scoring.inference import Captioner

NO_ADAPTER = "none"


@click.command()
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="IMAGE…")
@click.option("--adapter", default=None, metavar="VERSION|none", help="Adapter version; the newest unless given.")
@click.option("--prompt", default=None, help="Ask this in place of what the adapter was trained with.")
@click.option("--env", "-e", default=None, help="Recipe (a folder of conf/), as in `kedro run --env`.")
@click.option("--params", default="", callback=split_params, help="As in `kedro run --params`: recipe=…, device=…")
def caption(
    images: tuple[Path, ...], adapter: str | None, prompt: str | None, env: str | None, params: dict[str, Any]
) -> None:
    """Caption each IMAGE: pictures, folders, or CSV files with the column image_path.

    Prompt and image size are those of the adapter's record; with `--adapter none` the base model
    answers alone, by the configured ones.
    """
    keep_stdout_for_results()
    from kedro.framework.session import KedroSession

    from qwen_vl_lora.parameters import validate_parameters
    from qwen_vl_lora.samples.named_pictures import gather_pictures

    with KedroSession.create(env=env, runtime_params=params) as session:
        assert isinstance(session, KedroSession)
        context = session.load_context()
        parameters = validate_parameters(dict(context.params))
        gathered = gather_pictures(images, parameters.image, recursive=False)
        versions = {} if adapter in (None, NO_ADAPTER) else {"adapter": adapter}
        catalog = context._get_catalog(load_versions=versions)
        captioner = _load_captioner(catalog, parameters, with_adapter=adapter != NO_ADAPTER, prompt=prompt)
    _write(captioner, gathered)


def _load_captioner(catalog: Any, parameters: Parameters, *, with_adapter: bool, prompt: str | None) -> Captioner:
    from transformers.utils import logging as transformers_logging

    from qwen_vl_lora.scoring.inference import Captioner
    from qwen_vl_lora.scoring.settings import CaptionSettings

    transformers_logging.disable_progress_bar()
    base_model = catalog["base_model"].load()
    adapter = catalog["adapter"].load() if with_adapter else None
    settings = CaptionSettings.of_parameters(parameters)
    if adapter is not None:
        settings = settings.as_trained(adapter)
    return Captioner(base_model, adapter, settings if prompt is None else settings.asking(prompt))


def _write(captioner: Captioner, gathered: Gathered) -> None:
    captions = dict(zip(gathered.usable, captioner.caption(gathered.images, gathered.usable), strict=True))
    for picture in gathered.named:
        if picture.sha256 is not None:
            prefix = f"{_shown(picture.path)}: " if len(gathered.named) > 1 else ""
            click.echo(f"{prefix}{captions[picture.sha256]}")
        else:
            click.echo(f"{_shown(picture.path)}: {picture.reason}", err=True)
    if not captions:
        raise SystemExit(1)


def _shown(path: str) -> str:
    """A path that leaves the terminal as it is."""
    return printable(path, max_characters=len(path))
