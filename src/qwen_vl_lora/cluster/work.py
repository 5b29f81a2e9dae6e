"""Processes that share work: all at once as ranks of one group, or each with pieces of its own."""

from __future__ import annotations

import collections
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from qwen_vl_lora.cluster import local
from qwen_vl_lora.cluster.listening import Listener, OnRow
from qwen_vl_lora.cluster.pieces import Finished, hand_out
from qwen_vl_lora.cluster.rank import Job
from qwen_vl_lora.exceptions import DeviceError
from qwen_vl_lora.parameters import ClusterParameters
from qwen_vl_lora.runs.run import THIS_PROCESS

if TYPE_CHECKING:
    import torch

    from qwen_vl_lora.cluster.ray_cluster import Places

logger = logging.getLogger(__name__)

Piece = TypeVar("Piece")
Result = TypeVar("Result")


class Processes:
    """The processes that share a run's work. They are started when work is given.

    Args:
        cluster: how many, and where.
        device: of the computation; None for work without torch, which is then not imported.

    Attributes:
        count: processes in all.
        threads: of each process.

    Raises:
        DeviceError: if there are more processes than GPUs.
        ClusterError: if the cluster cannot be joined, or has less than it is asked for.
    """

    def __init__(self, cluster: ClusterParameters, device: torch.device | None) -> None:
        self._timeout = cluster.timeout
        self._device = device.type if device else ""
        self._places: Places | None = None
        if cluster.address is not None:
            from qwen_vl_lora.cluster.ray_cluster import find_places

            self._places = find_places(cluster, self._device)
            self.count, self.threads = self._places.processes, self._places.threads
        elif device is None:
            self.count, self.threads = 1 if cluster.processes == "auto" else cluster.processes, 1
        else:
            self.count, self.threads = _on_this_machine(cluster.processes, device)

    def on_ranks(self, function: Callable[..., Result], *arguments: Any, on_row: OnRow | None = None) -> list[Result]:
        """Call `function(*arguments, on_row)` in every process at once, in lockstep: each is a rank of one group.

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
        if self.count == 1:
            return [function(*arguments, on_row)]
        level = logging.getLogger("qwen_vl_lora").getEffectiveLevel()
        tells = on_row is not None
        job = Job(function, arguments, tells, self.count, self._device, self.threads, self._timeout, level)
        listener = Listener(job, on_row)
        logger.info("%s runs in %d processes.", function.__name__, self.count)
        if self._places is None:
            return local.run_ranks(job, listener)
        from qwen_vl_lora.cluster import ray_cluster

        return ray_cluster.run_ranks(job, listener, self._places)

    def in_pieces(self, work: Callable[[Piece], Result], pieces: Iterable[Piece]) -> Iterator[Finished[Result]]:
        """Call `work(piece)` for every piece, in whichever process is free. Pieces of a process that dies are repeated.

        Args:
            work: pickled once for each process, which keeps what it has loaded. One process calls it here.

        Yields:
            Pieces as they are finished.

        Raises:
            QwenVLLoraError: an error of `work`.
            ClusterError: if processes hang or die again and again.
        """
        if self.count == 1:
            for number, piece in enumerate(pieces):
                yield Finished(number, work(piece), THIS_PROCESS)
            return
        if self._places is None:
            workers = local.workers(work, self.count, self._device, self.threads)
        else:
            from qwen_vl_lora.cluster import ray_cluster

            workers = ray_cluster.workers(work, self._device, self._places)
        shares: collections.Counter[str] = collections.Counter()
        with workers as started:
            for finished in hand_out(started, pieces, self._timeout):
                shares[finished.process] += 1
                yield finished
        said = ", ".join(f"{process}: {count}" for process, count in sorted(shares.items()))
        logger.info("%s: %d pieces in %d processes (%s).", type(work).__name__, shares.total(), len(shares), said)


def _on_this_machine(processes: int | Literal["auto"], device: torch.device) -> tuple[int, int]:
    """Processes on this machine, and threads of each."""
    import torch

    threads = torch.get_num_threads()
    if device.type == "cpu":
        count = 1 if processes == "auto" else processes
        return count, max(1, threads // count)
    gpus = torch.cuda.device_count()
    count = gpus if processes == "auto" else processes
    if count > gpus:
        raise DeviceError(
            f"cluster.processes is {count}, but this machine has {gpus} GPUs and each process needs its own. "
            "Give at most that many, or `auto`."
        )
    return count, threads
