"""`qwen-vl-lora viz`: Kedro-Viz in a page that contacts no other host."""

from __future__ import annotations

import logging
import re
import webbrowser
from typing import Any

import click

from qwen_vl_lora.commands import completion
from qwen_vl_lora.commands.local_pages import HOST, LocalPages
from qwen_vl_lora.exceptions import MissingArtifactError
from qwen_vl_lora.session.console import project_folder, say

# Fonts that the page of Kedro-Viz links to. The browser falls back to system fonts.
_OUTSIDE_LINK = re.compile(rb"<link\b[^>]*\bhref=\"https?://[^>]*>", re.DOTALL)


@click.command()
@click.option("--port", type=click.IntRange(1024, 65535), default=4141, show_default=True, help="Port on this machine.")
@click.option(
    "--env",
    "-e",
    default=None,
    shell_complete=completion.environments,
    help="Recipe (a folder of conf/), as in `kedro run --env`.",
)
@click.option("--lite", is_flag=True, help="Do not import the project's code; works without torch.")
@click.option("--browser/--no-browser", default=True, help="Open the page.")
def viz(port: int, env: str | None, lite: bool, browser: bool) -> None:
    """Show pipelines and artifacts in the browser.

    Serves the page of `kedro viz` without its remote font and its check for a newer version, so it works offline
    and contacts no other host. It answers only the browser of this machine, and deploying is disabled.
    """
    logging.getLogger("py.warnings").setLevel(logging.ERROR)  # Kedro-Viz warns of its own deprecations, at its import
    try:
        import uvicorn
        from kedro_viz.api import apps
        from kedro_viz.server import load_and_populate_data
    except ImportError as error:
        raise MissingArtifactError("Kedro-Viz is not installed: pip install -r requirements.txt.") from error
    from kedro.framework.project import PACKAGE_NAME

    project = project_folder()
    load_and_populate_data(project, env=env, package_name=PACKAGE_NAME, is_lite=lite)
    app = apps.create_api_app_from_project(project)
    app.middleware("http")(_keep_to_this_machine)
    address = f"http://{HOST}:{port}/"
    say(f"Kedro-Viz is at {address} (Ctrl-C to stop)")
    if browser:
        webbrowser.open(address)
    uvicorn.run(LocalPages(app), host=HOST, port=port, log_level="warning")


async def _keep_to_this_machine(request: Any, call_next: Any) -> Any:
    from kedro_viz import __version__
    from starlette.responses import JSONResponse, Response

    if request.url.path == "/api/version":  # Kedro-Viz would query the package index for the newest version
        return JSONResponse({"installed": __version__, "isOutdated": False, "latest": __version__})
    answer = await call_next(request)
    if not answer.headers.get("content-type", "").startswith("text/html"):
        return answer
    page = b"".join([part async for part in answer.body_iterator])
    return Response(_OUTSIDE_LINK.sub(b"", page), status_code=answer.status_code, media_type="text/html")
