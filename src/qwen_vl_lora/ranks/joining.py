"""A further machine of a run: waits for its launches, takes part in each, and goes when the run ends."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from qwen_vl_lora.exceptions import LauncherError
from qwen_vl_lora.ranks.board import Address, Board
from qwen_vl_lora.ranks.errors import read_faults, root_of, to_error
from qwen_vl_lora.ranks.launching import FAREWELL_SECONDS, Ended, _processes_here, launch_here, versions

logger = logging.getLogger(__name__)


def take_part(address: Address, timeout: float) -> bool:
    """Give this machine to the run whose store listens at `address`.

    Args:
        timeout: seconds to wait for the run.

    Returns:
        Whether the run finished.

    Raises:
        LauncherError: if the run does not come, needs no further machine, dies, or cannot be served from here.
        QwenVLLoraError: a rank's own error.
    """
    board = Board.join(address, timeout)
    node = board.count("machines", 1)
    logger.info("Joined the run at %s as machine %d. Waiting for work.", address, node + 1)
    number = 1
    try:
        while (order := _next_order(board, number)) is not None:
            _serve(order, board, node)
            number += 1
        finished = bool(board.hear("ended"))
        board.count("left", 1)
    except RuntimeError as error:
        if type(error).__name__ not in ("DistNetworkError", "DistStoreError"):
            raise
        raise LauncherError(f"The run at {address} is gone: its process ended without a word.") from error
    logger.info("The run has %s.", "finished" if finished else "ended with an error")
    return finished


def _next_order(board: Board, number: int) -> dict[str, Any] | None:
    """The next launch; None when the run is over."""
    while True:
        order: dict[str, Any] | None = board.hear(f"launch/{number}")
        if order is not None:
            return order
        if board.hear("ended") is not None:
            return None
        time.sleep(0.25)


def _serve(order: dict[str, Any], board: Board, node: int) -> None:
    if node >= order["nnodes"]:
        board.count("left", 1)
        raise LauncherError(f"The run wants {order['nnodes']} machines (launcher.nnodes), and they are there already.")
    try:
        _check(order)
    except LauncherError as error:
        board.tell(f"failed/{order['launch']}", {"node": node, "why": f"Machine {node + 1}: {error}"})
        raise
    logger.info("%s: ranks %s", order["work"].partition(":")[2], order["nproc_per_node"])
    ended = launch_here(order, board, node)
    board.hear("ended")  # where the run is gone this says so, and not how its ranks here then ended
    _raise_what_happened(ended, order, board)


def _check(order: dict[str, Any]) -> None:
    if differing := {
        name: (theirs, ours) for name, theirs in order["versions"].items() if (ours := versions().get(name)) != theirs
    }:
        said = ", ".join(f"{name} {theirs} there, {ours} here" for name, (theirs, ours) in differing.items())
        raise LauncherError(f"This machine has other versions than the run: {said}. Install the same on all.")
    if not Path(order["folder"]).is_dir():
        raise LauncherError(
            f"This machine does not see the run's folder {order['folder']}. The project folder, data/ included, must "
            "be the same on all machines (a network filesystem, say); call this command inside it."
        )
    _processes_here(order["nproc_per_node"], order["device"])


def _raise_what_happened(ended: Ended, order: dict[str, Any], board: Board) -> None:
    if not ended.failed and ended.received is None and ended.verdict is None:
        return
    faults = read_faults(Path(order["folder"]))
    if faults and not root_of(faults).is_echo:
        raise to_error(root_of(faults), order["world_size"])
    if ended.verdict is None and _hears_the_end(board):  # the run has cleared its folder already
        raise LauncherError("The run has ended with an error; what it was stands in the run's own output.")
    raise LauncherError(ended.verdict or "The ranks of this machine were ended.")


def _hears_the_end(board: Board) -> bool:
    until = time.monotonic() + FAREWELL_SECONDS
    while board.hear("ended") is None and time.monotonic() < until:
        time.sleep(0.25)
    return board.hear("ended") is not None
