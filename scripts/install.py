"""Install packages into the environment of the Python that runs this: `.venv/bin/python scripts/install.py -r FILE`.

uv does it, in a third of pip's time. uv is taken from the path, or pip installs it into the environment first.
uv does not read pip's configuration, so indexes, certificates and proxies that pip is configured with are passed to
uv as environment variables; UV_ variables that are set already win. Where uv cannot be had, does not know a
setting of pip's, or fails, pip installs, and one line says so.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import shutil
import ssl
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")

VARIABLES = {
    "index-url": ("UV_INDEX_URL",),
    "extra-index-url": ("UV_EXTRA_INDEX_URL",),
    "find-links": ("UV_FIND_LINKS",),
    "trusted-host": ("UV_INSECURE_HOST",),
    "constraint": ("UV_CONSTRAINT",),
    "client-cert": ("SSL_CLIENT_CERT",),
    "proxy": ("HTTP_PROXY", "HTTPS_PROXY"),
    "timeout": ("UV_HTTP_TIMEOUT",),
    "default-timeout": ("UV_HTTP_TIMEOUT",),
    "retries": ("UV_HTTP_RETRIES",),
}
"""What uv reads instead of a setting of pip's, where the value needs no more than another separator."""

WITHOUT_EFFECT = {
    "break-system-packages", "cache-dir", "config-file", "debug", "disable-pip-version-check", "exists-action",
    "log", "no-cache-dir", "no-color", "no-input", "no-python-version-warning", "prefer-binary",
    "progress-bar", "quiet", "require-virtualenv", "root-user-action", "use-feature", "verbose", "yes",
}  # fmt: skip
"""Settings of pip's that change nothing about which files are installed into a virtual environment."""


def main(arguments: list[str]) -> int:
    configuration = pip_configuration()
    unknown = sorted(configuration.keys() - VARIABLES.keys() - WITHOUT_EFFECT - {"cert", "no-index"})
    if unknown:
        return install_with_pip(f"uv has no setting for pip's {', '.join(unknown)}", arguments)
    uv = find_uv()
    if uv is None:
        return install_with_pip("uv could not be installed", arguments)
    options = ["--no-index"] if is_true(configuration.get("no-index", "")) else []
    if sys.dont_write_bytecode:  # uv leaves compiling to the first import, which then compiles anew in each process
        options.append("--compile-bytecode")
    command = [uv, "pip", "install", "--python", sys.executable, *options, *arguments]
    code = subprocess.run(command, env=uv_environment(configuration, os.environ), check=False).returncode
    if code > 0:
        return install_with_pip(f"uv ended with exit code {code}", arguments)
    return -code  # a signal stops the installation


def pip_configuration() -> dict[str, str]:
    """What `pip install` takes from its files and from PIP_ variables, by option."""
    if importlib.util.find_spec("pip") is None:  # `uv venv` makes environments without it
        return {}
    done = subprocess.run([*PIP, "config", "list"], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(done.returncode)  # pip has named the file that it cannot read
    return read_configuration(done.stdout)


def read_configuration(listing: str) -> dict[str, str]:
    """The settings of a listing of `pip config list`; later sections win, and an empty value is no value."""
    found = [line.partition("=") for line in listing.splitlines()]
    settings = [(*name.strip().rpartition(".")[::2], ast.literal_eval(value)) for name, _, value in found if value]
    sections = ("global", "install", ":env:")
    return {name: value for wanted in sections for section, name, value in settings if section == wanted and value}


def uv_environment(configuration: Mapping[str, str], environment: Mapping[str, str]) -> dict[str, str]:
    """The environment in which uv finds what pip is configured with."""
    translated = {}
    for setting in sorted(configuration.keys() & VARIABLES.keys()):
        words = configuration[setting].split()
        value = ("," if setting == "find-links" else " ").join(words)  # pip separates by blanks
        if "timeout" in setting:
            value = str(round(float(value)))
        translated.update(dict.fromkeys(VARIABLES[setting], value))
    if "extra-index-url" in configuration:
        translated["UV_INDEX_STRATEGY"] = "unsafe-best-match"  # uv would ask the first index that has a name, pip all
    given = {name: value for name, value in environment.items() if name.startswith("UV_")}
    return {**environment, **certificates(configuration, environment), **translated, **given}


def certificates(configuration: Mapping[str, str], environment: Mapping[str, str]) -> dict[str, str]:
    """Variables that make uv trust whom pip trusts."""
    bundle = configuration.get("cert") or next(
        filter(None, map(environment.get, ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"))), None
    )
    if bundle:
        return {"SSL_CERT_DIR" if Path(bundle).is_dir() else "SSL_CERT_FILE": bundle}
    paths = ssl.get_default_verify_paths()
    system = sys.platform != "linux" or paths.cafile or (paths.capath and any(Path(paths.capath).iterdir()))
    return {"UV_SYSTEM_CERTS": "1"} if system else {}


def is_true(value: str) -> bool:
    return value.lower() in ("1", "true", "yes", "on", "y", "t")


def find_uv() -> str | None:
    """uv's path: on the path, in the environment, or installed into it now."""
    beside = str(Path(sys.executable).parent)
    found = shutil.which("uv") or shutil.which("uv", path=beside)
    if found is None:
        print("Installing uv.", flush=True)
        subprocess.run([*PIP, "install", "--quiet", "uv"], check=False)
        found = shutil.which("uv", path=beside)
    return found


def install_with_pip(reason: str, arguments: list[str]) -> int:
    print(f"{reason}: pip installs instead, which takes several minutes.", flush=True)
    return subprocess.run([*PIP, "install", *arguments], check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
