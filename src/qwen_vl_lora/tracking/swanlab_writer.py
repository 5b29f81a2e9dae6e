"""A process that writes one SwanLab run. It reads and answers messages of one JSON line.

    in    {"open": {…}}, then {"log": {…}, "step": 3}, {"pictures": {…}, "step": 62}, {"config": {…}},
          and at last {"finish": "success", "error": null, "seconds": 5}
    out   {"id": …, "folder": …, "url": …} once the run is open, or {"refused": "why"}

It is started as a file and imports nothing of this project but `writer`, and the project never imports SwanLab. So the
run need not wait for a client without a network, and SwanLab's changes to signals, exceptions and exit stay in this
process.
"""

from __future__ import annotations

import base64
import io
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

from qwen_vl_lora.tracking import writer

ANSWER_SECONDS = 3
OPEN_SECONDS = 30
CUT_OFF: dict[str, Any] = {
    "finish": "aborted",
    "error": "The process that made this run ended before the run did.",
    "seconds": 5,
}


class CloudError(Exception):
    """The cloud cannot be used; the message has the reason."""


def main() -> int:
    """Handle messages until the input ends. Returns 0 if all of them were written."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the run ends this process, also if SIGTERM goes to all processes
    answers = writer.take_output()
    try:
        import swanlab  # noqa: F401  as early as possible: it takes a second
    except Exception as error:
        writer.answer(answers, refused=f"SwanLab cannot be imported: {_told(error)}")
        return 1
    messages = writer.messages()
    for message in messages:
        if "open" in message:
            try:
                run = _open(**message["open"])
            except Exception as error:
                writer.answer(answers, refused=_told(error))
                return 1
            writer.answer(
                answers,
                id=message["open"]["id"],
                folder=str(run.dir),
                url=run.url if message["open"]["mode"] == "online" else None,
            )
            _write(run, messages)
    return 0


def _told(error: Exception) -> str:
    return " ".join(str(error).split())[:300] if isinstance(error, CloudError) else writer.told(error)


def _open(mode: str, **named: Any) -> Any:
    import swanlab

    settings: dict[str, Any] = {
        "interactive": False,
        # On by default: host name, working directory, command line, git remote, packages and the terminal's output.
        "probe": dict.fromkeys(("hardware", "runtime", "requirements", "conda", "git", "swanlab", "monitor"), False),
        "terminal": {"proxy_type": "none"},
    }
    if mode == "online":
        _check_cloud()
        settings["core"] = {"skip_store": True}  # another writer keeps the complete record
        named["resume"] = "allow"
        signal.alarm(OPEN_SECONDS)
    run = swanlab.init(mode=mode, settings=swanlab.Settings(**settings), **named)
    signal.alarm(0)
    return run


def _check_cloud() -> None:
    """Check the cloud first: SwanLab's client tries for 15 to 75 seconds, and reports a wrong key for any cause."""
    import requests
    import swanlab

    settings = swanlab.Settings()
    address, key = settings.api_host, settings.api_key
    if not key:
        raise CloudError("there is no key: set SWANLAB_API_KEY or log in with `swanlab login`")
    try:
        login = f"{address}/api/login/api_key"
        status = requests.post(login, headers={"authorization": key}, timeout=ANSWER_SECONDS).status_code
    except requests.RequestException as error:
        raise CloudError(f"{address} does not answer within {ANSWER_SECONDS} s") from error
    if status in (401, 403):
        raise CloudError(f"{address} refuses the key ({status})")
    if status >= 500:
        raise CloudError(f"{address} answers with an error ({status})")


def _write(run: Any, messages: Iterator[dict[str, Any]]) -> None:
    ending = CUT_OFF
    for message in messages:
        if "log" in message:
            run.log(message["log"], step=message["step"])
        elif "pictures" in message:
            run.log({name: _pictures(shown) for name, shown in message["pictures"].items()}, step=message["step"])
        elif "config" in message:
            run.config.update(message["config"])
        elif "finish" in message:
            ending = message
            break
    signal.alarm(ending["seconds"])  # `finish` closes the local record, then waits for the cloud, unlimited
    run.finish(state=ending["finish"], error=ending["error"])
    os._exit(0)  # does not wait for threads that wait for the network


def _pictures(shown: list[dict[str, str]]) -> list[Any]:
    import swanlab
    from PIL import Image

    opened = [(Image.open(io.BytesIO(base64.b64decode(one["png"]))), one["caption"]) for one in shown]
    return [swanlab.Image(image.convert("RGB"), caption=caption, file_type="jpg") for image, caption in opened]


if __name__ == "__main__":
    sys.exit(main())
