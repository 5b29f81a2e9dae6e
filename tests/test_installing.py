"""`scripts/install.py`: which command it runs under which configuration. No test reaches a network."""

import importlib.util
import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from conftest import PROJECT

SCRIPT = PROJECT / "scripts" / "install.py"
_spec = importlib.util.spec_from_file_location("install", SCRIPT)
install = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(install)

RECORD = """
import json, os, sys
with open(os.environ["RECORD"], "a") as record:
    print(json.dumps([{name!r}, sys.argv[1:], dict(os.environ)]), file=record)
"""
PIP = """
if sys.argv[-2:] == ["config", "list"]:
    print(os.environ["LISTING"])
elif sys.argv[-1] == "uv" and "uv from pip" in os.environ:
    import pathlib, shutil
    shutil.copy(os.environ["uv from pip"], pathlib.Path(sys.executable).parent / "uv")
elif sys.argv[-1] == "uv":
    sys.exit(1)
"""


class Machine:
    """An environment whose pip, and a path whose uv, write down how they were called."""

    def __init__(self, folder: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
        self.python = folder / "venv" / "bin" / "python"
        self.bin = folder / "bin"
        self.uv = folder / "uv"
        self.record = folder / "calls"
        self.bin.mkdir()
        purelib = sysconfig.get_path("purelib", vars={"base": str(folder / "venv")})
        pip = Path(purelib) / "pip"
        pip.mkdir(parents=True)
        (pip / "__init__.py").touch()
        (pip / "__main__.py").write_text(RECORD.format(name="pip") + PIP)
        self.environment = {"PATH": str(self.bin), "RECORD": str(self.record), "LISTING": ""}
        self.write_uv(0)

    def write_uv(self, code: int) -> None:
        self.uv.write_text(f"#!{sys.executable}\n{RECORD.format(name='uv')}\nsys.exit({code})\n")
        self.uv.chmod(0o755)

    def put_uv_on_the_path(self, code: int = 0) -> None:
        self.write_uv(code)
        self.uv.rename(self.bin / "uv")

    def install(self, *arguments: str) -> tuple[subprocess.CompletedProcess[str], list]:
        """What the script said, and the calls that it made after it asked for the configuration."""
        done = subprocess.run(
            [self.python, SCRIPT, *arguments], env=self.environment, capture_output=True, text=True, check=False
        )
        calls = [json.loads(line) for line in self.record.read_text().splitlines()]
        return done, [call for call in calls if call[1][-2:] != ["config", "list"]]


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def test_uv_on_the_path_installs_into_this_pythons_environment(machine):
    machine.put_uv_on_the_path()
    done, [[program, arguments, _]] = machine.install("-r", "requirements.txt")
    assert (program, done.returncode) == ("uv", 0)
    assert arguments == ["pip", "install", "--python", str(machine.python), "-r", "requirements.txt"]


def test_modules_are_compiled_at_once_where_no_import_may_write_them(machine):
    machine.put_uv_on_the_path()
    machine.environment["PYTHONDONTWRITEBYTECODE"] = "1"
    _, [[_, arguments, _]] = machine.install("-r", "requirements.txt")
    assert "--compile-bytecode" in arguments


def test_pip_brings_uv_where_there_is_none(machine):
    machine.environment["uv from pip"] = str(machine.uv)
    done, [[first, brought, _], [second, arguments, _]] = machine.install("--no-deps", "-e", ".")
    assert (first, brought[-3:]) == ("pip", ["install", "--quiet", "uv"])
    assert (second, arguments[-3:]) == ("uv", ["--no-deps", "-e", "."])
    assert done.stdout == "Installing uv.\n"
    _, calls = machine.install("-r", "x")
    assert [call[0] for call in calls[2:]] == ["uv"], "uv is in the environment now"


def test_pip_installs_and_says_so_where_uv_cannot_be_had(machine):
    done, calls = machine.install("-r", "requirements.txt")
    assert [call[0] for call in calls] == ["pip", "pip"]
    assert calls[1][1] == ["--disable-pip-version-check", "install", "-r", "requirements.txt"]
    assert done.stdout.splitlines()[1:] == [
        "uv could not be installed: pip installs instead, which takes several minutes."
    ]


def test_pip_installs_where_uv_fails(machine):
    machine.put_uv_on_the_path(code=2)
    done, calls = machine.install("-r", "requirements.txt")
    assert [call[0] for call in calls] == ["uv", "pip"]
    assert "uv ended with exit code 2: pip installs instead" in done.stdout
    assert done.returncode == 0


def test_an_interrupted_installation_does_not_begin_again_with_pip(machine):
    machine.put_uv_on_the_path()
    (machine.bin / "uv").write_text(f"#!{sys.executable}\nimport os\nos.kill(os.getpid(), 2)\n")
    done, calls = machine.install("-r", "requirements.txt")
    assert calls == []
    assert done.returncode == 2


def test_a_setting_that_uv_has_no_word_for_leaves_the_work_to_pip(machine):
    machine.put_uv_on_the_path()
    machine.environment["LISTING"] = "global.target='/somewhere'\n:env:.no-binary=':all:'\n:env:.timeout='9'"
    done, calls = machine.install("-r", "requirements.txt")
    assert [call[0] for call in calls] == ["pip"]
    assert done.stdout.startswith("uv has no setting for pip's no-binary, target: pip installs instead")


def test_uv_is_given_the_index_and_certificates_of_pip(machine, tmp_path):
    machine.put_uv_on_the_path()
    machine.environment["LISTING"] = "\n".join([
        "global.index-url='https://index.test/simple'",
        "global.extra-index-url='https://one.test/simple\\nhttps://two.test/simple'",
        f"global.cert={str(tmp_path / 'ca.pem')!r}",
        "global.no-index='true'",
        "global.find-links='/a /b'",
        "install.trusted-host='one.test'",
        ":env:.default-timeout='60.0'",
    ])  # fmt: skip
    machine.environment["UV_HTTP_TIMEOUT"] = "7"
    _, [[_, arguments, environment]] = machine.install("-r", "requirements.txt")
    wanted = {
        "UV_INDEX_URL": "https://index.test/simple",
        "UV_EXTRA_INDEX_URL": "https://one.test/simple https://two.test/simple",
        "UV_INDEX_STRATEGY": "unsafe-best-match",
        "UV_FIND_LINKS": "/a,/b",
        "UV_INSECURE_HOST": "one.test",
        "UV_HTTP_TIMEOUT": "7",
        "SSL_CERT_FILE": str(tmp_path / "ca.pem"),
    }
    assert {name: environment.get(name) for name in wanted} == wanted
    assert "--no-index" in arguments


def test_the_environment_is_as_it_was_where_pip_is_not_configured(tmp_path):
    given = {"PATH": "/bin", "SSL_CERT_FILE": "/etc/ca.pem"}
    assert install.uv_environment({}, given) == given
    assert install.uv_environment({}, {"REQUESTS_CA_BUNDLE": "/ca.pem"})["SSL_CERT_FILE"] == "/ca.pem"
    assert install.uv_environment({"cert": str(tmp_path)}, {})["SSL_CERT_DIR"] == str(tmp_path)
    assert install.uv_environment({}, {}).keys() <= {"UV_SYSTEM_CERTS"}


def test_pips_own_proxy_wins_and_uvs_own_index_wins():
    given = {"HTTPS_PROXY": "http://shell.test", "UV_INDEX_URL": "https://uv.test"}
    found = install.uv_environment({"proxy": "http://pip.test", "index-url": "https://pip.test"}, given)
    assert found["HTTPS_PROXY"] == "http://pip.test"
    assert found["UV_INDEX_URL"] == "https://uv.test"


def test_real_pip_lists_its_configuration_in_the_form_that_is_read(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    file = tmp_path / "pip.conf"
    file.write_text(
        "[global]\nindex-url = https://a.test/simple\nretries = 1\n[install]\nretries = 2\n"
        "extra-index-url =\n    https://b.test/simple?x=1\n    https://c.test/simple\n[list]\nformat = columns\n"
    )
    monkeypatch.setenv("PIP_CONFIG_FILE", str(file))
    monkeypatch.setenv("PIP_INDEX_URL", "https://d.test/simple")
    monkeypatch.setenv("PIP_PROXY", "")
    found = install.pip_configuration()
    assert found["index-url"] == "https://d.test/simple"
    assert found["extra-index-url"].split() == ["https://b.test/simple?x=1", "https://c.test/simple"]
    assert found["retries"] == "2"
    assert "proxy" not in found
    assert "format" not in found, "another command's setting"


def test_make_installs_by_this_script_alone():
    recipe = (PROJECT / "Makefile").read_text()
    assert "INSTALL := $(BIN)/python scripts/install.py" in recipe
    assert "pip install" not in recipe
