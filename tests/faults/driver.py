"""Runs one pipeline again and again, each time in a fork, and kills it where it is told to.

Reads one JSON line for each run: {"pipelines", "params", "fault", "steps"}; answers with {"status"}.
Everything heavy is imported once, before the first fork.
"""

import gc
import json
import os
import random
import signal
import sys
import threading
from pathlib import Path

answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what Kedro and the runs print goes to stderr

import peft  # noqa: E402, F401
import torch  # noqa: E402
from kedro.framework.session import KedroSession  # noqa: E402
from kedro.framework.startup import bootstrap_project  # noqa: E402

from qwen_vl_lora.datasets import adapter as adapter_dataset  # noqa: E402
from qwen_vl_lora.datasets import artifacts  # noqa: E402
from qwen_vl_lora.training import checkpoints, interruption, loop, train  # noqa: E402

gc.collect()
gc.freeze()  # or each fork would read, and so copy, all of it


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(owner, name, number, *, after=False):
    """Replace `owner.name` by one that dies at its `number`-th call, before or after doing its work."""
    original, calls = getattr(owner, name), [0]

    def counted(*arguments, **options):
        calls[0] += 1
        if calls[0] == number and not after:
            die()
        result = original(*arguments, **options)
        if calls[0] == number:
            die()
        return result

    setattr(owner, name, counted)


def half_written(number):
    """Die with the optimizer's file cut in the middle."""
    original, calls = torch.save, [0]

    def cut(parts, file, *arguments, **options):
        original(parts, file, *arguments, **options)
        calls[0] += Path(file).name == "optimizer.pt"
        if Path(file).name == "optimizer.pt" and calls[0] == number:
            os.truncate(file, random.Random(number).randrange(Path(file).stat().st_size))
            die()

    torch.save = cut


def after_seconds(seconds):
    begin = loop.TrainingLoop.run

    def train(self, *arguments, **options):
        threading.Timer(seconds, die).start()
        return begin(self, *arguments, **options)

    loop.TrainingLoop.run = train


def ask(number, by):
    """Send a signal to oneself at the `number`-th step, as Ctrl-C or a scheduler would."""
    begin, calls = loop.TrainingLoop.compute_gradients, [0]

    def step(self, *arguments):
        calls[0] += 1
        if calls[0] == number:
            os.kill(os.getpid(), by)
        return begin(self, *arguments)

    loop.TrainingLoop.compute_gradients = step


def at_the_end(act):
    """Act when no step is left."""
    agree = interruption.SaveOnSignal.agree

    def at_end(self, where):
        if where == "the end of training":
            act()
        return agree(self, where)

    interruption.SaveOnSignal.agree = at_end


FAULTS = {
    "sigterm": lambda n: ask(n, signal.SIGTERM),
    "sigint": lambda n: ask(n, signal.SIGINT),
    "sigterm_at_end": lambda n: at_the_end(lambda: os.kill(os.getpid(), signal.SIGTERM)),
    "step": lambda n: at_call(loop.TrainingLoop, "compute_gradients", n),
    "accumulation": lambda n: at_call(loop.TrainingLoop, "summed_loss", n, after=True),
    "write": half_written,
    "seal": lambda n: at_call(checkpoints, "seal", n, after=True),
    "rename": lambda n: at_call(checkpoints, "replace", n),
    "renamed": lambda n: at_call(checkpoints, "replace", n, after=True),
    "prune": lambda n: at_call(loop, "prune", n),
    "validation": lambda n: at_call(loop.TrainingLoop, "validation_loss", n),
    "load_best": lambda n: at_the_end(die),
    "stage": lambda n: at_call(train, "stage_adapter", n, after=True),
    "note_run": lambda n: at_call(adapter_dataset, "note_run", n, after=True),
    "publish": lambda n: at_call(artifacts, "_publish_version", n),
    "published": lambda n: at_call(artifacts, "_publish_version", n, after=True),
    "seconds": after_seconds,
}


def note_steps(file):
    """Write down each step as it begins."""
    begin = loop.TrainingLoop.compute_gradients

    def step(self, *arguments):
        with Path(file).open("a") as lines:
            lines.write(f"{self.state.step + 1}\n")
        return begin(self, *arguments)

    loop.TrainingLoop.compute_gradients = step


def run(order):
    if order["fault"]:
        kind, number = order["fault"]
        FAULTS[kind](number)
    note_steps(order["steps"])
    with KedroSession.create(project_path=Path.cwd(), runtime_params=order["params"]) as session:
        session.run(pipeline_names=order["pipelines"])


def main():
    bootstrap_project(Path.cwd())
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if child == 0:
            try:
                run(order)
                os._exit(0)
            except BaseException as error:
                print(repr(error), file=sys.stderr, flush=True)
                os._exit(1)
        _, status = os.waitpid(child, 0)
        answers.write(json.dumps({"status": os.waitstatus_to_exitcode(status)}) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
