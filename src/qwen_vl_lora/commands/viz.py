"""`qwen-vl-lora viz`: Kedro-Viz in a page that asks nothing of any other host."""

from __future__ import annotations

import re
import webbrowser
from typing import Any

import click

from qwen_vl_lora.console import project_folder
from qwen_vl_lora.exceptions import MissingArtifactError

HOST = "127.0.0.1"

# Fonts that Kedro-Viz's page links to; the system's own letters stand in for them.
_OUTSIDE_LINK = re.compile(rb"<link\b[^>]*\bhref=\"https?://[^>]*>", re.DOTALL)


@click.command()
@click.option("--port", type=click.IntRange(1024, 65535), default=4141, show_default=True, help="On this machine only.")
@click.option("--env", "-e", default=None, help="Recipe (a folder of conf/), as in `kedro run --env`.")
@click.option("--lite", is_flag=True, help="Import none of the project's code: works where torch is not installed.")
@click.option("--browser/--no-browser", default=True, help="Open the page.")
def viz(port: int, env: str | None, lite: bool, browser: bool) -> None:
    """Show pipelines and artifacts in the browser.

    The page of `kedro viz`, without the font that it fetches from another host and without its look for a newer
    version: it works offline and tells nobody that it was opened.
    """
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
    click.echo(f"Kedro-Viz is at {address} (Ctrl-C ends it)")
    if browser:
        webbrowser.open(address)
    uvicorn.run(app, host=HOST, port=port, log_level="warning")


async def _keep_to_this_machine(request: Any, call_next: Any) -> Any:
    from kedro_viz import __version__
    from starlette.responses import JSONResponse, Response

    if request.url.path == "/api/version":  # Kedro-Viz would ask the package index for the newest
        return JSONResponse({"installed": __version__, "isOutdated": False, "latest": __version__})
    answer = await call_next(request)
    if not answer.headers.get("content-type", "").startswith("text/html"):
        return answer
    page = b"".join([part async for part in answer.body_iterator])
    return Response(_OUTSIDE_LINK.sub(b"", page), status_code=answer.status_code, media_type="text/html")
