"""In a container the run is process 1, which elsewhere means that a parent has died."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cluster import works
from cluster.processes import wait_until

AS_FIRST_PROCESS = ["unshare", "--map-root-user", "--pid", "--fork", "--kill-child"]


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs Linux's unshare")
def test_ranks_work_where_their_launcher_is_process_1(tmp_path, mark):
    if subprocess.run([*AS_FIRST_PROCESS, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no new process namespace is allowed here")
    sign = tmp_path / "sign"
    script = [sys.executable, works.__file__, "here", str(sign)]
    paths = [str(Path(works.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    with subprocess.Popen([*AS_FIRST_PROCESS, *script], env=environment, stderr=subprocess.PIPE, text=True) as process:
        both_came = wait_until(lambda: sign.exists() or process.poll() is not None, 120) and sign.exists()
        process.kill()
        assert both_came, process.communicate()[1]
