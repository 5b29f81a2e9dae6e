"""Processes in a Ray cluster that is already there: it is joined and never started here. Only this module names Ray."""

from __future__ import annotations

import collections
import contextlib
import functools
import importlib.metadata
import importlib.util
import logging
import os
import signal
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_vl_lora.cluster import here
from qwen_vl_lora.cluster.faults import Fault
from qwen_vl_lora.cluster.listening import Listener, Signals
from qwen_vl_lora.cluster.pieces import Worker
from qwen_vl_lora.cluster.rank import Job, Message, run_rank, tell_fault, use_device
from qwen_vl_lora.exceptions import ClusterError
from qwen_vl_lora.parameters import ClusterParameters
from qwen_vl_lora.runs.storage import temporary

logger = logging.getLogger(__name__)

_VERSIONS = ("torch", "transformers", "peft", "accelerate", "qwen-vl-lora", "ray")
_ANSWER_SECONDS = 120
"""Longest wait for a process of the cluster to start and answer."""
_FAREWELL_SECONDS = 5.0
_NEWS_SECONDS = 0.25
_PLACE_SECONDS = 3
_TOKEN = "See docs/several-gpus.md: ray get-auth-token --generate, the same token on every machine, then `ray start`"


def _join(address: str) -> Any:
    """The library, connected to the cluster at `address`. Signal handlers stay as they are.

    Raises:
        ClusterError: if Ray is not installed, no cluster answers, or this machine has no token.
    """
    if importlib.util.find_spec("ray") is None:
        raise ClusterError("cluster.address needs Ray, which is not installed: pip install -e '.[cluster]'.")
    if not _has_token():
        raise ClusterError(
            "cluster.address: this machine has no token of a Ray cluster, and a cluster without one lets everybody who "
            f"reaches it run programs there. {_TOKEN}."
        )
    os.environ["RAY_AUTH_MODE"] = "token"  # read at import
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray

    if ray.is_initialized():
        return ray
    with Signals().restored():
        try:
            ray.init(address=address, log_to_driver=False, configure_logging=False, logging_level=logging.ERROR)
        except (ConnectionError, ValueError, RuntimeError) as error:
            if "InvalidAuthToken" in "".join(traceback.format_exception(error)):
                raise ClusterError(f"cluster.address {address}: the cluster has another token. {_TOKEN}.") from error
            raise ClusterError(
                f"cluster.address {address}: no Ray cluster can be joined ({str(error).splitlines()[0]}). Start one on "
                "the first machine with `ray start --head`, on this and every other one with `ray start "
                "--address=HOST:PORT`, all with the same token."
            ) from error
    return ray


def _has_token() -> bool:
    file = os.environ.get("RAY_AUTH_TOKEN_PATH", Path.home() / ".ray" / "auth_token")
    return "RAY_AUTH_TOKEN" in os.environ or Path(file).is_file()


@dataclass(frozen=True)
class Places:
    """Room for processes in a cluster, the same for each.

    Attributes:
        processes: in all.
        threads, gpus: of each process.
        timeout: seconds that processes may wait for free places.
    """

    address: str
    processes: int
    threads: int
    gpus: int
    timeout: float


def find_places(cluster: ClusterParameters, device: str) -> Places:
    """The places of a run in the cluster, which is joined.

    Raises:
        ClusterError: if the cluster has fewer GPUs or CPUs than asked for.
    """
    address = str(cluster.address)
    nodes = _nodes(_join(address))
    cpus = [int(node["Resources"].get("CPU", 0)) for node in nodes]
    gpus = sum(int(node["Resources"].get("GPU", 0)) // cluster.gpus_per_process for node in nodes)
    processes = cluster.processes
    if processes == "auto":
        processes = gpus if device == "cuda" else sum(map(bool, cpus))
    if device == "cuda" and not 0 < processes <= gpus:
        raise ClusterError(
            f"cluster.processes is {cluster.processes}, but the cluster has GPUs for {gpus}. Add machines, or lower it."
        )
    gpus_of_each = cluster.gpus_per_process if device == "cuda" else 0
    for threads in range(max(cpus, default=0), 0, -1):
        if sum(number // threads for number in cpus) >= processes:
            return Places(address, processes, threads, gpus_of_each, cluster.timeout)
    raise ClusterError(
        f"cluster.processes is {processes}, but the cluster has {sum(cpus)} CPUs and each process needs one."
    )


def check(cluster: ClusterParameters, workspace: Path, look: Callable[[], str]) -> None:
    """Whether every machine sees the project and what else it needs, has the same packages, and asks for a token.

    Args:
        workspace: where a file is written that all machines must see.
        look: called on every machine; says what is wrong there.

    Raises:
        ClusterError: naming the machine and what differs.
    """
    ray = _join(str(cluster.address))
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    workspace.mkdir(parents=True, exist_ok=True)
    mark = temporary(workspace / "seen-by-all")
    mark.touch()
    asked = (_versions(), Path.cwd(), mark.absolute(), look)
    try:
        looks = {}
        for node in _nodes(ray):
            where = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            there = ray.remote(_look).options(num_cpus=0, scheduling_strategy=where, max_retries=0)
            looks[f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"] = there.remote(*asked)
        for name, answer in looks.items():
            try:
                said = ray.get(answer, timeout=_ANSWER_SECONDS)
            except ray.exceptions.RayError as error:
                said = f"cannot run this project: {_last_line(error)}. Install the same environment at the same path"
            if said:
                raise ClusterError(f"Machine {name} of the cluster {said}.")
    finally:
        mark.unlink(missing_ok=True)


def _look(versions: dict[str, str], project: Path, mark: Path, look: Callable[[], str]) -> str:
    """Say what this machine of the cluster lacks; empty if nothing."""
    theirs = _versions()
    if differing := [name for name in versions if theirs[name] != versions[name]]:
        said = ", ".join(f"{name} {theirs[name]} in place of {versions[name]}" for name in differing)
        return f"has other versions: {said}. Install the same on all machines"
    if os.environ.get("RAY_AUTH_MODE") != "token":
        return f"asks for no token, so everybody who reaches it may run programs there. {_TOKEN}"
    if not (project.is_dir() and mark.is_file()):
        return (
            f"does not see {project}. The project folder, data/ included, must be shared by all machines at the same "
            "path (a network filesystem, say)"
        )
    os.chdir(project)
    return look()


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in _VERSIONS}


def _nodes(ray: Any) -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].rstrip(".")


@contextlib.contextmanager
def _actors(ray: Any, kind: type[Any], places: Places, strategy: str, *arguments: Any) -> Iterator[dict[str, Any]]:
    """Processes of the cluster, by a name that says where each is. They end with the context and with this process."""
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    needs = {"CPU": places.threads, **({"GPU": places.gpus} if places.gpus else {})}
    group = placement_group([needs] * places.processes, strategy=strategy)
    started: list[Any] = []
    try:
        if not group.wait(_PLACE_SECONDS):
            logger.info("Waiting for %d free places in the cluster.", places.processes)
            if not group.wait(places.timeout):
                raise ClusterError(
                    f"The cluster had no free places for {places.processes} processes with {places.threads} CPUs each "
                    f"within cluster.timeout {places.timeout} s."
                )
        for number in range(places.processes):
            place = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=number)
            options = {"num_cpus": places.threads, "num_gpus": places.gpus, "max_concurrency": kind.at_once}
            there = ray.remote(kind).options(**options, scheduling_strategy=place)
            started.append(there.remote(str(Path.cwd()), *arguments))
        try:
            hosts = ray.get([actor.host.remote() for actor in started], timeout=_ANSWER_SECONDS)
        except ray.exceptions.RayError as error:
            raise ClusterError(f"A process of the cluster did not start: {_last_line(error)}.") from error
        yield {f"process {number} on {host}": started[number] for number, host in enumerate(hosts)}
    finally:
        for actor in started:
            ray.kill(actor)
        remove_placement_group(group)


class _Actor:
    """A process of the cluster, in the project's folder.

    Attributes:
        at_once: calls that it takes at the same time; the others wait.
    """

    at_once = 1

    def __init__(self, folder: str) -> None:
        os.chdir(folder)
        os.environ["TORCH_CPP_LOG_LEVEL"] = "FATAL"

    def host(self) -> str:
        return socket.gethostname()


class _Rank(_Actor):
    """One rank. Its work runs in one thread; the others answer meanwhile."""

    at_once = 4

    def __init__(self, folder: str) -> None:
        super().__init__(folder)
        self._messages: collections.deque[Message] = collections.deque()

    def meeting(self) -> str:
        """A free port of this machine, where all ranks can meet."""
        import ray

        with socket.socket() as free:
            free.bind(("", 0))
            return f"tcp://{ray.util.get_node_ip_address()}:{free.getsockname()[1]}"

    def run(self, job: Job, rank: int, meeting: str) -> tuple[Any, Fault | None]:
        host, port = meeting.removeprefix("tcp://").rsplit(":", 1)
        ranks = {"RANK": rank, "WORLD_SIZE": job.world_size, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
        os.environ.update({name: str(value) for name, value in ranks.items()}, MASTER_ADDR=host, MASTER_PORT=port)
        try:
            return run_rank(job, rank, meeting, self._messages.append), None
        except BaseException as error:
            return None, tell_fault(rank, error, lambda _: None)

    def news(self) -> list[Message]:
        """Messages since the last call, and where the work is."""
        time.sleep(_NEWS_SECONDS)
        said: list[Message] = [("status", here.status())]
        while self._messages:
            said.append(self._messages.popleft())
        return said

    def stop(self, number: int) -> None:
        here.asked_to_stop = signal.Signals(number)


class _Worker(_Actor):
    """Does pieces, one after the other."""

    def __init__(self, folder: str, work: Callable[[Any], Any], device: str, threads: int) -> None:
        super().__init__(folder)
        self._work, self._device, self._threads = work, device, threads

    def do(self, piece: Any) -> Any:
        use_device(self._device, 0, self._threads)
        return self._work(piece)


def run_ranks(job: Job, listener: Listener, places: Places) -> list[Any]:
    """Run the job in as many processes as it has ranks. Errors are those of `Processes.on_ranks`."""
    ray = _join(places.address)
    signals, given = Signals(), ray.put(job)
    results: dict[int, Any] = {}
    with _actors(ray, _Rank, places, "PACK") as named, signals.restored():
        names, actors = list(named), list(named.values())
        meeting = ray.get(actors[0].meeting.remote(), timeout=_ANSWER_SECONDS)
        runs = {actor.run.remote(given, rank, meeting): rank for rank, actor in enumerate(actors)}
        news = {actor.news.remote(): rank for rank, actor in enumerate(actors)}
        until = float("inf")

        def stop(number: signal.Signals) -> None:
            for actor in actors:
                actor.stop.remote(int(number))

        with signals.kept(stop):
            while runs and time.monotonic() < until:
                for done in ray.wait([*runs, *news], timeout=_NEWS_SECONDS)[0]:
                    if done in news:
                        rank = news.pop(done)
                        if _hear(ray, done, rank, listener) and rank in runs.values():
                            news[actors[rank].news.remote()] = rank
                        continue
                    rank = runs.pop(done)
                    results[rank], fault = _ended(ray, done, rank, names[rank])
                    if fault is not None:
                        listener.faults.append(fault)
                        until = min(until, time.monotonic() + _FAREWELL_SECONDS)
                listener.check_progress()
        for said, rank in news.items():
            _hear(ray, said, rank, listener)
        for rank in results:
            _hear(ray, actors[rank].news.remote(), rank, listener)
        if not listener.faults and signals.received is None:
            return [results[rank] for rank in range(job.world_size)]
    listener.raise_fault(signals.received)
    raise AssertionError("unreachable")


def _hear(ray: Any, said: Any, rank: int, listener: Listener) -> bool:
    """Take what a rank said. False if it is gone, which its run tells."""
    try:
        messages = ray.get(said, timeout=_FAREWELL_SECONDS)
    except ray.exceptions.RayError:
        return False
    for message in messages:
        listener.hear(rank, message)
    return True


def _ended(ray: Any, run: Any, rank: int, name: str) -> tuple[Any, Fault | None]:
    try:
        ended: tuple[Any, Fault | None] = ray.get(run)
    except ray.exceptions.RayActorError:
        gone = f"({name}) ended without a message: it was killed, or its machine is gone. What was saved is kept; the "
        return None, Fault.of_death(rank, f"{gone}same command resumes from there.")
    return ended


def _do(actor: Any, piece: Any) -> Future[Any]:
    task: Future[Any] = actor.do.remote(piece).future()
    return task


@contextlib.contextmanager
def workers(work: Callable[[Any], Any], device: str, places: Places) -> Iterator[list[Worker]]:
    """Context with processes for `pieces.hand_out`.

    Raises:
        QwenVLLoraError: an error of `work`.
    """
    ray = _join(places.address)
    with _actors(ray, _Worker, places, "SPREAD", work, device, places.threads) as actors:
        try:
            yield [
                Worker(
                    name,
                    functools.partial(_do, actor),
                    ray.exceptions.RayActorError,
                    f"{name} was lost: it was killed, or its machine is gone",
                )
                for name, actor in actors.items()
            ]
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error
