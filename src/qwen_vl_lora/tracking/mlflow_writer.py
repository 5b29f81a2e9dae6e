"""A process that writes one MLflow run. It reads and answers messages of one JSON line.

    in    {"open": {…}}, then {"log": {…}, "step": 3}, {"pictures": […], "step": 62}, {"artifact": "path", "name": …},
          {"config": {…}}, and at last {"finish": "FINISHED", "error": null, "seconds": 10}
    out   {"url": …, "run": …} once the run is open, {"trouble": "why"} at a fault, and at the end
          {"missing": ["numbers"]}: what the server has not taken

It is started as a file and imports nothing of this project but `writer`. What the server does not take is kept and sent
again later, so a server that is away for some time misses nothing. Files wait for numbers, and numbers never for files.
"""

from __future__ import annotations

import base64
import contextlib
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TextIO

from qwen_vl_lora.tracking import writer

ANSWER_SECONDS = 5
FILE_SECONDS = 60
PAUSE_SECONDS = 10
IDENTITY = "qwen_vl_lora.training"
CUT_OFF: dict[str, Any] = {
    "finish": "KILLED",
    "error": "The process that made this run ended before the run did.",
    "seconds": 10,
}
_LONGEST_PARAMETER, _LONGEST_TAG, _BATCH = 6000, 5000, 100
_PARAMETERS = "parameters."
_DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": str(ANSWER_SECONDS),
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # what failed is sent again here, without waiting
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}


class OneRun:
    """One run on a server. Its methods send at once, and raise what the server or the network answers."""

    def __init__(self, tracking_uri: str, experiment: str, identity: str, name: str) -> None:
        self._uri, self._experiment, self._identity, self._name = tracking_uri, experiment, identity, name
        self._known: set[tuple[str, int]] = set()
        self._parameters: set[str] = set()
        self.id = ""

    def open(self, config: Mapping[str, Any]) -> str:
        """Continue the run of this training, or create it. Returns its address."""
        from mlflow import MlflowClient

        self._client = MlflowClient(self._uri)
        experiment = self._experiment_id()
        found = self._client.search_runs([experiment], f"tags.`{IDENTITY}` = '{self._identity}'", max_results=1)
        if found:
            self.id, data = found[0].info.run_id, found[0].data
            self._client.update_run(self.id, status="RUNNING")
            self._parameters = set(data.params)
            for key in data.metrics:
                self._known |= {(key, point.step) for point in self._client.get_metric_history(self.id, key)}
        else:
            tags = {IDENTITY: self._identity}
            self.id = self._client.create_run(experiment, tags=tags, run_name=self._name).info.run_id
        self.configure(config)
        if not self._uri.startswith("http"):
            return self._uri
        return f"{self._uri.rstrip('/')}/#/experiments/{experiment}/runs/{self.id}"

    def _experiment_id(self) -> str:
        from mlflow.exceptions import MlflowException

        if known := self._client.get_experiment_by_name(self._experiment):
            return str(known.experiment_id)
        try:
            return str(self._client.create_experiment(self._experiment))
        except MlflowException:
            if known := self._client.get_experiment_by_name(self._experiment):  # another run was quicker
                return str(known.experiment_id)
            raise

    def configure(self, config: Mapping[str, Any]) -> None:
        """Parameters by their dotted names, such as `lora.r`; all other facts as tags, which may change later."""
        from mlflow.entities import Param, RunTag

        named = {key.removeprefix(_PARAMETERS): value for key, value in config.items() if key.startswith(_PARAMETERS)}
        texts = {key: _text(value, _LONGEST_PARAMETER) for key, value in named.items() if key not in self._parameters}
        for batch in _batches([Param(key, text) for key, text in texts.items()]):
            self._send(batch, lambda part: self._client.log_batch(self.id, params=part))
        self._parameters |= texts.keys()
        tags = {key: value for key, value in config.items() if not key.startswith(_PARAMETERS)}
        for batch in _batches([RunTag(key, _text(value, _LONGEST_TAG)) for key, value in tags.items()]):
            self._send(batch, lambda part: self._client.log_batch(self.id, tags=part))

    def _send(self, batch: list[Any], send: Callable[[list[Any]], None]) -> None:
        """Send a batch; if the server refuses it for one of its values, send the others."""
        from mlflow.exceptions import MlflowException

        try:
            send(batch)
        except MlflowException as error:
            if error.error_code not in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "DATA_LOSS"):
                raise
            for one in batch if len(batch) > 1 else ():
                self._send([one], send)

    def log(self, values: Mapping[str, float], step: int, milliseconds: int) -> None:
        """Values of one step; those that a resumed run already has are left out."""
        from mlflow.entities import Metric

        new = {name: value for name, value in values.items() if (name, step) not in self._known}
        metrics = [Metric(name, float(value), milliseconds, step) for name, value in new.items()]
        for batch in _batches(metrics):
            self._send(batch, lambda part: self._client.log_batch(self.id, metrics=part))
        self._known |= {(name, step) for name in new}

    def show(self, pictures: list[dict[str, str]], step: int) -> None:
        """Pictures as MLflow shows them, by step, and their captions in one text."""
        from PIL import Image

        for place, shown in enumerate(pictures):
            image = Image.open(io.BytesIO(base64.b64decode(shown["png"]))).convert("RGB")
            self._client.log_image(self.id, image, key=f"Prediction_{place}", step=step, synchronous=True)
        text = "\n\n".join(f"Prediction_{place}\n{shown['caption']}" for place, shown in enumerate(pictures))
        self._client.log_text(self.id, f"{text}\n", "predictions.txt")

    def store(self, folder: str, name: str) -> subprocess.Popen[bytes]:
        """Begin to send a folder as an artifact, which may take minutes, in a process of its own."""
        send = "import mlflow, sys; mlflow.MlflowClient().log_artifacts(*sys.argv[1:])"
        # The address may have a password, which a command line would show to everybody on this machine.
        more = {"MLFLOW_TRACKING_URI": self._uri, "MLFLOW_HTTP_REQUEST_TIMEOUT": str(FILE_SECONDS)}
        command = [sys.executable, "-P", "-c", send, self.id, folder, name]
        return subprocess.Popen(command, env={**os.environ, **more})

    def finish(self, status: str, error: str | None) -> None:
        """The end of the run."""
        if error:
            self._client.set_tag(self.id, "error", error[:_LONGEST_TAG])
        self._client.set_terminated(self.id, status)


def main() -> int:
    """Handle messages until the input ends. Returns 0 if all of them were written."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the run ends this process, also if SIGTERM goes to all processes
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    answers = writer.take_output()
    try:
        import mlflow  # noqa: F401  as early as possible: it takes seconds
    except Exception as error:
        writer.answer(answers, trouble=f"MLflow cannot be imported: {writer.told(error)}")
        return 1
    _Writing(answers).follow(itertools.chain(writer.messages(), [CUT_OFF]))
    return 0


class _Writing:
    """One run, told of message by message: what was sent, and what is still to be sent."""

    def __init__(self, answers: TextIO) -> None:
        self._answers = answers
        self._run: OneRun | None = None
        self._numbers: list[Callable[[OneRun], Any]] = []
        self._pictures: list[Callable[[OneRun], Any]] = []
        self._artifacts: list[subprocess.Popen[bytes]] = []
        self._next_try = 0.0

    def follow(self, messages: Iterable[dict[str, Any]]) -> None:
        """Send what the messages say, until the one that ends the run."""
        for message in messages:
            self._note(message)
            if "finish" in message:
                self._end(time.monotonic() + message["seconds"])
                return
            if time.monotonic() >= self._next_try:
                self._send(self._numbers) and self._send(self._pictures)

    def _note(self, message: dict[str, Any]) -> None:
        if "open" in message:
            self._run = OneRun(**message["open"]["run"])
            self._numbers.append(lambda run: self._open(run, message["open"]["config"]))
        elif "log" in message:
            milliseconds = int(time.time() * 1000)
            self._numbers.append(lambda run: run.log(message["log"], message["step"], milliseconds))
        elif "pictures" in message:
            self._pictures.append(lambda run: run.show(message["pictures"], message["step"]))
        elif "artifact" in message:
            store = lambda run: self._artifacts.append(run.store(message["artifact"], message["name"]))  # noqa: E731
            self._numbers.append(store)
        elif "config" in message:
            self._numbers.append(lambda run: run.configure(message["config"]))
        else:
            self._numbers.append(lambda run: run.finish(message["finish"], message["error"]))

    def _open(self, run: OneRun, config: Mapping[str, Any]) -> None:
        url = run.open(config)
        writer.answer(self._answers, url=url, run=run.id)

    def _send(self, waiting: list[Callable[[OneRun], Any]]) -> bool:
        """Send in order, up to the first fault. Returns whether nothing is left."""
        try:
            while waiting and self._run is not None:
                waiting[0](self._run)
                del waiting[0]
        except Exception as error:
            self._next_try = time.monotonic() + PAUSE_SECONDS
            writer.answer(self._answers, trouble=writer.told(error))
        return not waiting

    def _end(self, deadline: float) -> None:
        missing = []
        if not self._send(self._numbers):
            missing.append("numbers")
        elif not self._send(self._pictures):
            missing.append("pictures")
        for sending in self._artifacts:
            with contextlib.suppress(subprocess.TimeoutExpired):
                sending.wait(max(0.0, deadline - time.monotonic()))
            if sending.poll() != 0:
                sending.kill()
                missing.append("adapter")
        writer.answer(self._answers, missing=missing)


def _batches(values: list[Any]) -> Iterator[list[Any]]:
    for first in range(0, len(values), _BATCH):
        yield values[first : first + _BATCH]


def _text(value: Any, longest: int) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


if __name__ == "__main__":
    sys.exit(main())
