"""The fresh subprocess of one measurement: `python -m benchmarks.worker JOB.json RESULT.json`.

The clock starts when everything is imported and the data lie on the disk. It stops when the task
has written its result. Peak memory is read before anything else is computed.
"""

from __future__ import annotations

import importlib
import resource
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.jobs import Job, write_json


def import_models(threads: int) -> None:
    """What both sides would otherwise import inside the measured time."""
    import peft  # noqa: F401
    import qwen_vl_utils  # noqa: F401
    import torch
    import transformers
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl  # noqa: F401
    from transformers.models.qwen2_vl import modeling_qwen2_vl  # noqa: F401

    torch.set_num_threads(threads)
    transformers.utils.logging.set_verbosity_error()


def peak_memory_mb() -> float:
    """Largest resident memory of this process so far, in MiB.

    Children are left out: neither side keeps any (the tutorials' map runs in the process), and Linux
    counts into a short-lived one all the pages it shares with its parent.
    """
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)


def peak_cuda_mb() -> float | None:
    """Largest allocation on the GPU in MiB; None where there is none or torch was not used."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return None
    return round(torch.cuda.max_memory_allocated() / 2**20, 1)


def run(job: Job) -> dict[str, Any]:
    """Carry out the job and measure it."""
    if job.torch:
        import_models(job.threads)
    module = importlib.import_module(job.module)
    started = time.perf_counter()
    busy = time.process_time()
    outcome = getattr(module, job.task)(job)
    seconds, busy = time.perf_counter() - started, time.process_time() - busy
    result = {
        "seconds": round(seconds, 3),
        "cpu_s": round(busy, 3),
        "peak_mb": peak_memory_mb(),
        "peak_cuda_mb": peak_cuda_mb(),
        **outcome,
    }
    if job.check:
        result["check"] = module.check(job)
    return result


if __name__ == "__main__":
    write_json(Path(sys.argv[2]), run(Job.read(Path(sys.argv[1]))))
