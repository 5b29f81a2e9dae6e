"""`qwen-vl-lora watch`: a board of this machine for the runs of a recipe."""

from __future__ import annotations

import webbrowser

import click

from qwen_vl_lora.commands import completion
from qwen_vl_lora.commands.local_pages import HOST, LocalPages, LocalWsgiPages
from qwen_vl_lora.exceptions import MissingArtifactError
from qwen_vl_lora.names import check_name
from qwen_vl_lora.parameter_groups import nearest
from qwen_vl_lora.runs.pruning import recipes
from qwen_vl_lora.runs.records import all_records
from qwen_vl_lora.session.console import project_folder, say
from qwen_vl_lora.tracking.boards import choose_board, show_stored

NEWEST = 50
"""Stored runs that are put on the board, at most."""


@click.command()
@click.option(
    "--recipe", shell_complete=completion.recipes, help="Recipe whose runs are shown; default: that of the newest run."
)
@click.option("--port", type=click.IntRange(1024, 65535), default=6006, show_default=True, help="Port on this machine.")
@click.option("--browser/--no-browser", default=True, help="Open the page.")
def watch(recipe: str | None, port: int, browser: bool) -> None:
    """Show curves, metrics and pictures of the runs of a recipe in the browser, without an account.

    The board is the one that is installed; if none is, a message says which to install. Runs that are not on the board
    yet are added from what they stored. The page answers only the browser of this machine,
    and nothing can be changed in it.
    """
    project = project_folder()
    known = set(recipes(project))
    if recipe is not None and check_name("--recipe", recipe) not in known:
        raise MissingArtifactError(
            f"No run of recipe {recipe!r} is recorded{nearest(recipe, known)}. "
            f"Recipes with runs: {', '.join(sorted(known)) or 'none'}."
        )
    records = all_records(project)
    if not records:
        raise MissingArtifactError("No run is recorded yet. `kedro run` makes one.")
    recipe = recipe or records[-1].recipe
    board = choose_board(project / "logs", recipe)
    shown = [record for record in records if record.recipe == recipe][-NEWEST:]
    new = show_stored(board, shown, project)
    address = f"http://{HOST}:{port}/"
    say(f"{board.name}, recipe {recipe}, {new} stored runs added: {address} (Ctrl-C to stop)")
    if browser:
        webbrowser.open(address)
    board.serve(HOST, port, LocalPages if board.interface == "asgi" else LocalWsgiPages)
