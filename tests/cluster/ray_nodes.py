"""A Ray cluster of two nodes on this machine, in a network of its own that nothing outside of it can reach."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from cluster.processes import wait_until

HEAD, SECOND = "127.0.0.2", "127.0.0.3"
ADDRESS = f"{HEAD}:6399"
_LOOPBACK_UP = (
    "import fcntl, socket, struct; "
    "fcntl.ioctl(socket.socket(socket.AF_INET, socket.SOCK_DGRAM), 0x8914, struct.pack('16sh', b'lo', 0x41))"
)


class Nodes:
    """Started by `ray start`, as an administrator does. Both nodes ask for a token, which lies in `home`."""

    def __init__(self, folder: Path) -> None:
        self.home = folder
        self.environment = {
            **os.environ,
            "HOME": str(folder),
            "PYTHONPATH": str(Path(__file__).parents[1]),
            "RAY_AUTH_MODE": "token",
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
            "RAY_worker_niceness": "0",  # beside other work on the machine they would starve
        }
        self._holder = subprocess.Popen(["unshare", "--map-root-user", "--net", "sleep", "infinity"])
        time.sleep(0.5)
        self.run([sys.executable, "-c", _LOOPBACK_UP])
        self._ray("get-auth-token", "--generate")
        where = ["--port=6399", "--include-dashboard=false", f"--temp-dir={folder / 'ray'}"]
        self._ray("start", "--head", *where, "--num-cpus=1", f"--node-ip-address={HEAD}")
        self.start_second()

    def start_second(self) -> None:
        self._ray("start", f"--address={ADDRESS}", "--num-cpus=1", f"--node-ip-address={SECOND}")

    def kill_second(self) -> None:
        """As a machine that loses its power: its raylet first, then everything that it started."""
        started = self.of_second("")
        for pid in [*self._raylet(), *started]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def of_second(self, title: str) -> list[int]:
        """Ids of the processes that the second node started and that have this title."""
        raylets = set(self._raylet())
        return [pid for pid in self.processes(title) if _parent(pid) in raylets]

    def _raylet(self) -> list[int]:
        return self.processes("raylet/raylet", f"node_ip_address={SECOND}")

    def inside(self, command: list[str]) -> list[str]:
        """The command in the cluster's network."""
        return ["nsenter", f"--target={self._holder.pid}", "--user", "--net", "--preserve-credentials", *command]

    def run(self, command: list[str], **options) -> subprocess.CompletedProcess[str]:
        how = {"env": self.environment, "capture_output": True, "text": True, "timeout": 280, **options}
        return subprocess.run(self.inside(command), **how)

    def start(self, command: list[str], **options) -> subprocess.Popen[str]:
        how = {"env": self.environment, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, **options}
        return subprocess.Popen(self.inside(command), **how)

    def processes(self, *words: str) -> list[int]:
        """Ids of the cluster's processes whose command line or environment has all the words."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                text = (folder / "cmdline").read_bytes() + (folder / "environ").read_bytes()
                is_ours = f"HOME={self.home}\0".encode() in text
                if is_ours and all(word.encode() in text for word in words):
                    found.append(int(folder.name))
        return found

    def stop(self) -> None:
        self._ray("stop", "--force")
        self._holder.kill()
        self._holder.wait()
        assert wait_until(lambda: not self.processes("ray"), 20), self.processes("ray")

    def _ray(self, *arguments: str) -> None:
        done = self.run([str(Path(sys.executable).with_name("ray")), *arguments])
        assert done.returncode == 0, done.stdout + done.stderr


def _parent(pid: int) -> int | None:
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return None
