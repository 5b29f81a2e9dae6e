"""The two ways to share work among processes: `on_ranks` and `in_pieces`."""

from __future__ import annotations

import collections
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from qwen_vl_lora.cluster import local
from qwen_vl_lora.cluster.listening import Listener, OnRow
from qwen_vl_lora.cluster.pieces import Finished, hand_out
from qwen_vl_lora.cluster.rank import Job
from qwen_vl_lora.exceptions import DeviceError
from qwen_vl_lora.parameters import ClusterParameters
from qwen_vl_lora.runs.run import THIS_PROCESS

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

Piece = TypeVar("Piece")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Size:
    """Processes in all, and threads of each."""

    processes: int
    threads: int


def size_of(cluster: ClusterParameters, device: torch.device | None) -> Size:
    """How many processes share the work. Without a device, for work that needs no torch, `auto` is as on a CPU.

    Raises:
        DeviceError: if there are more processes than GPUs.
        ClusterError: if the cluster cannot be joined, or has less than it is asked for.
    """
    if cluster.address is not None:
        from qwen_vl_lora.cluster import ray_cluster

        return Size(*ray_cluster.size(cluster, device.type if device else "cpu"))
    if device is None:
        return Size(1 if cluster.processes == "auto" else cluster.processes, 1)
    import torch

    threads = torch.get_num_threads()
    if device.type == "cpu":
        processes = 1 if cluster.processes == "auto" else cluster.processes
        return Size(processes, max(1, threads // processes))
    gpus = torch.cuda.device_count()
    processes = gpus if cluster.processes == "auto" else cluster.processes
    if processes > gpus:
        raise DeviceError(
            f"cluster.processes is {processes}, but this machine has {gpus} GPUs and each process needs its own. "
            "Give at most that many, or `auto`."
        )
    return Size(processes, threads)


def on_ranks(
    function: Callable[..., Result],
    *arguments: Any,
    cluster: ClusterParameters,
    device: torch.device,
    on_row: OnRow | None = None,
) -> list[Result]:
    """Call `function(*arguments, on_row)` in every process at once, in lockstep: each is a rank of one process group.

    One process calls it here. Arguments and results of several are pickled.

    Args:
        on_row: called in this process with the rows that the first rank passes to its last argument.

    Returns:
        What each rank returned, in their order.

    Raises:
        QwenVLLoraError: a rank's own error, with the rank's number before the message.
        ClusterError: if a rank was killed, hung, or ended with an unexpected error.
        RunInterruptedError: on SIGTERM or Ctrl-C, after the ranks saved a checkpoint.
    """
    size = size_of(cluster, device)
    if size.processes == 1:
        return [function(*arguments, on_row)]
    level = logging.getLogger("qwen_vl_lora").getEffectiveLevel()
    tells = on_row is not None
    job = Job(function, arguments, tells, size.processes, device.type, size.threads, cluster.timeout, level)
    listener = Listener(job, on_row)
    logger.info("%s runs in %d processes.", function.__name__, size.processes)
    if cluster.address is None:
        return local.run_ranks(job, listener)
    from qwen_vl_lora.cluster import ray_cluster

    return ray_cluster.run_ranks(job, listener, cluster)


def in_pieces(
    work: Callable[[Piece], Result],
    pieces: Iterable[Piece],
    cluster: ClusterParameters,
    device: torch.device | None = None,
) -> Iterator[Finished[Result]]:
    """Call `work(piece)` for every piece, in whichever process is free. Pieces of a process that dies are repeated.

    Args:
        work: pickled once for each process, which keeps what it has loaded. One process calls it here.
        device: None for work without torch, which is then not imported.

    Yields:
        Pieces as they are finished.

    Raises:
        QwenVLLoraError: an error of `work`.
        ClusterError: if processes hang or die again and again.
    """
    size = size_of(cluster, device)
    if size.processes == 1:
        for number, piece in enumerate(pieces):
            yield Finished(number, work(piece), THIS_PROCESS)
        return
    kind = device.type if device else ""
    if cluster.address is None:
        workers = local.workers(work, size.processes, kind, size.threads)
    else:
        from qwen_vl_lora.cluster import ray_cluster

        workers = ray_cluster.workers(work, cluster, kind)
    shares: collections.Counter[str] = collections.Counter()
    with workers as started:
        for finished in hand_out(started, pieces, cluster.timeout):
            shares[finished.process] += 1
            yield finished
    said = ", ".join(f"{process}: {count}" for process, count in sorted(shares.items()))
    logger.info("%s: %d pieces in %d processes (%s).", type(work).__name__, shares.total(), len(shares), said)
