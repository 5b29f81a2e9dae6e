"""Chromium without a window, driven through its DevTools protocol: what the tests of pages need and no more."""

from __future__ import annotations

import base64
import http.server
import json
import os
import shutil
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-port=0",
)


def chromium() -> str | None:
    """Path of the browser, or None."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


needs_chromium = pytest.mark.skipif(
    chromium() is None and not os.environ.get("CI"), reason="Chromium is not installed: apt-get install chromium"
)
"""Skips a test on a machine without a browser; where CI is set, the test runs and fails."""


class Page:
    """One tab: what it logged, what it asked the network for, and what its JavaScript says."""

    def __init__(self, socket: Any) -> None:
        self._socket = socket
        self._last = 0
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.choosers: list[int] = []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")

    def open(self, url: str, width: int = 1440, height: int = 900, storage: dict[str, str] | None = None) -> None:
        """Show `url`; `storage` is put into localStorage before any script of the page runs."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self._call("Emulation.setDeviceMetricsOverride", **size)
        for name, value in (storage or {}).items():
            source = f"localStorage.setItem({json.dumps(name)}, {json.dumps(value)})"
            self._call("Page.addScriptToEvaluateOnNewDocument", source=source)
        self._call("Page.navigate", url=url)

    def js(self, expression: str) -> Any:
        """The value of a JavaScript expression; promises are awaited."""
        told = self._call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in told, told["exceptionDetails"]
        return told["result"].get("value")

    def wait_for(self, expression: str, seconds: float = 60) -> Any:
        """The expression's value as soon as it is true."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            value = self.js(expression)
            if value:
                return value
            time.sleep(0.1)
        raise AssertionError(f"{expression} did not become true in {seconds} s; errors: {self.errors}")

    def screenshot(self, file: Path) -> None:
        file.write_bytes(base64.b64decode(self._call("Page.captureScreenshot", format="png")["data"]))

    def pdf(self) -> bytes:
        """The page as it is printed."""
        return base64.b64decode(self._call("Page.printToPDF", printBackground=True, preferCSSPageSize=True)["data"])

    def download_to(self, folder: Path) -> None:
        """Let the page save files into a folder."""
        self._call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder))

    def prefer(self, scheme: str) -> None:
        """Show pages in the `light` or the `dark` scheme."""
        self._call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def press(self, key: str, number: int, text: str = "") -> None:
        """Press a key: its name, its Windows number and what it types."""
        typed = {"text": text} if text else {}
        self._call("Input.dispatchKeyEvent", type="keyDown", key=key, code=key, windowsVirtualKeyCode=number, **typed)
        self._call("Input.dispatchKeyEvent", type="keyUp", key=key, code=key, windowsVirtualKeyCode=number)

    def type(self, text: str) -> None:
        """Type a text where the focus is."""
        self._call("Input.insertText", text=text)

    def choose_file(self, file: Path) -> None:
        """Give a file to the chooser that the page opens; `intercept_choosers` came first."""
        end = time.monotonic() + 20
        while not self.choosers:
            assert time.monotonic() < end, "the page opened no chooser of files"
            self.js("0")  # takes the browser's events
            time.sleep(0.1)
        self._call("DOM.setFileInputFiles", files=[str(file)], backendNodeId=self.choosers.pop())

    def intercept_choosers(self) -> None:
        """Note choosers of files in `choosers` and do not show them."""
        self._call("Page.setInterceptFileChooserDialog", enabled=True)

    def _call(self, method: str, **params: Any) -> Any:
        self._last += 1
        self._socket.send(json.dumps({"id": self._last, "method": method, "params": params}))
        while True:
            message = json.loads(self._socket.recv(timeout=60))
            if message.get("id") == self._last:
                assert "error" not in message, message["error"]
                return message["result"]
            self._note(message.get("method"), message.get("params", {}))

    def _note(self, event: str, params: dict[str, Any]) -> None:
        if event == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif event == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(params["exceptionDetails"])[:500])
        elif event == "Runtime.consoleAPICalled" and params["type"] in ("error", "assert"):
            self.errors.append(json.dumps(params["args"])[:500])
        elif event == "Page.fileChooserOpened":
            self.choosers.append(params["backendNodeId"])
        elif event == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.errors.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")


@contextmanager
def open_page(profile: Path) -> Iterator[Page]:
    """A tab of a new browser whose profile is `profile`, a folder that does not exist yet."""
    from websockets.sync.client import connect

    command = [chromium() or "chromium", *FLAGS, f"--user-data-dir={profile}", "about:blank"]
    browser = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        port = _debugging_port(profile, browser)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json", timeout=10) as answer:
            tab = next(target for target in json.load(answer) if target["type"] == "page")
        with connect(tab["webSocketDebuggerUrl"], max_size=None, proxy=None) as socket:
            yield Page(socket)
    finally:
        browser.terminate()
        browser.wait(timeout=20)


def findings_of_axe(page: Page, address: str, ready: str = "document.readyState == 'complete'") -> list[str]:
    """What axe-core, whose path is in AXE_CORE, finds wrong with a page: on a desk and a phone, light and dark.

    Args:
        ready: an expression that is true once the page is there.
    """
    script = Path(os.environ["AXE_CORE"]).read_text(encoding="utf-8")
    found = []
    for width, scheme in ((1440, "light"), (1440, "dark"), (390, "light"), (390, "dark")):
        page.prefer(scheme)
        page.open(address, width=width)
        page.wait_for(ready)
        page.js(f"{script}; 0")
        told = "axe.run().then(result => result.violations.map(one => one.id + ' ' + one.nodes[0].target))"
        found += [f"{width} {scheme}: {finding}" for finding in page.js(told)]
    return found


def _debugging_port(profile: Path, browser: subprocess.Popen[bytes]) -> int:
    for _ in range(300):
        file = profile / "DevToolsActivePort"
        if file.is_file() and (lines := file.read_text().splitlines()):
            return int(lines[0])
        assert browser.poll() is None, "Chromium ended at once"
        time.sleep(0.1)
    raise AssertionError("Chromium opened no debugging port in 30 s")


class _WithFallback(http.server.SimpleHTTPRequestHandler):
    """Files of a folder; a path without a file is a page of the app inside index.html."""

    def do_GET(self) -> None:
        if not Path(self.translate_path(self.path)).exists():
            self.path = "/index.html"
        super().do_GET()

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def serve(folder: Path) -> Iterator[str]:
    """The address of a server for `folder` on the loopback."""
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), lambda *arguments: _WithFallback(*arguments, directory=str(folder))
    )
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
