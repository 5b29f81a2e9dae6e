"""What is printed acts on no terminal and ends no run, whatever the streams, the encoding and the machine are like."""

import errno
import json
import os
import pty
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from command_line import call, kedro_run, make_project
from qwen_vl_lora.exceptions import MachineError
from qwen_vl_lora.faults import machine_fault
from qwen_vl_lora.session.console import expected_error

SAYS_MUCH = r"""
import logging, sys, warnings
from rich.logging import RichHandler
from rich.table import Table
from qwen_vl_lora.session.console import prepare_terminal, say, terminal
logging.basicConfig(handlers=[RichHandler()], format="%(message)s")
prepare_terminal()
text = "[bold]一 :cat: \x1b]0;owned\x07 \x9b2J \u202e \udcff [link=x]y[/link]"
say(text)
say(text, err=True)
logging.getLogger("x").warning("%s", text)
warnings.warn(text)
table = Table("a", title=text, caption=text)
table.add_row(text)
terminal().print(table)
terminal().print(text)
print(text)
print(text, file=sys.stderr)
print("end", file=open(OUT, "w"))
"""


def start(script, folder, *, redirect="", **environment):
    """The script in a process of its own; what it wrote, and whether it came to its end."""
    (folder / "script.py").write_text(script.replace("OUT", repr(str(folder / "end"))))
    command = f"{sys.executable} {folder / 'script.py'} {redirect}"
    result = subprocess.run(
        ["bash", "-c", command], cwd=folder, capture_output=True, timeout=60, env={**os.environ, **environment}
    )
    return result, (folder / "end").is_file()


def acts(written):
    return [byte for byte in (b"\x1b", b"\x07", b"\xc2\x9b", "\u202e".encode()) if byte in written]


def test_nothing_that_is_printed_acts_on_a_terminal_and_brackets_are_text(tmp_path):
    result, ended = start(SAYS_MUCH, tmp_path)
    assert ended, result.stderr
    assert acts(result.stdout) == acts(result.stderr) == []
    assert result.stdout.count(rb"\x1b]0;owned\x07") == 7
    assert result.stdout.count(b"[bold]") == result.stdout.count(b":cat:") == result.stdout.count(b"[link=x]y") == 7


def test_on_a_terminal_colours_are_all_that_is_sent(tmp_path):
    (tmp_path / "script.py").write_text(SAYS_MUCH.replace("OUT", repr(str(tmp_path / "end"))))
    ours, theirs = pty.openpty()
    with subprocess.Popen([sys.executable, tmp_path / "script.py"], stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        written = b""
        while True:
            try:
                piece = os.read(ours, 65536)
            except OSError:
                break
            if not piece:
                break
            written += piece
        process.wait()
    os.close(ours)
    assert b"\x1b[" in written  # of rich's tables
    assert b"\x1b]" not in written
    assert b"\x07" not in written
    assert acts(written) == [b"\x1b"]


@pytest.mark.parametrize(
    "encoding",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "latin-1"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ],
)
def test_a_terminal_that_is_not_utf8_is_sent_escapes(tmp_path, encoding):
    result, ended = start(SAYS_MUCH, tmp_path, **encoding)
    assert ended, result.stderr
    assert rb"\u4e00" in result.stdout
    assert rb"\u4e00" in result.stderr


@pytest.mark.parametrize("redirect", [">&-", "2>&-", "<&-", ">&- 2>&- <&-", "2>/dev/full"])
def test_closed_streams_end_nothing(tmp_path, redirect):
    script = SAYS_MUCH + "import subprocess; subprocess.run(['cat'], check=True)\nassert open(OUT).read() == 'end\\n'\n"
    result, ended = start(script, tmp_path, redirect=redirect)
    assert ended, result.stdout + result.stderr
    assert result.returncode == 0


def test_a_file_never_takes_the_number_of_a_closed_stream(tmp_path):
    script = "from qwen_vl_lora.session.console import prepare_terminal\nprepare_terminal()\nimport os\n"
    script += "with open(OUT, 'w') as file:\n    os.system('echo printed; echo printed >&2')\n"
    script += "    file.write(str(file.fileno() > 2))\n"
    result, _ = start(script, tmp_path, redirect=">&- 2>&- <&-")
    assert result.returncode == 0
    assert (tmp_path / "end").read_text() == "True"


def test_messages_and_logs_hold_no_secret(tmp_path):
    script = (
        "import logging\nfrom qwen_vl_lora.session.console import prepare_terminal, show_messages_for_expected_errors\n"
        "from qwen_vl_lora.exceptions import ParameterError\nlogging.basicConfig()\nprepare_terminal()\n"
        "show_messages_for_expected_errors()\n"
        "logging.getLogger('x').warning('https://user:PLANT@ED@host/ and %s', 'EnvPLANTED1')\n"
        "raise ParameterError('https://user:PLANT@ED@host/c.csv is not there; got EnvPLANTED1')\n"
    )
    (tmp_path / "pyproject.toml").write_text(
        "[tool.kedro]\npackage_name='x'\nproject_name='x'\nkedro_init_version='1'\n"
    )
    result, _ = start(script, tmp_path, HUB_TOKEN="EnvPLANTED1")
    log = (tmp_path / "logs/errors.log").read_text()
    assert "Traceback" in log
    assert b"Traceback" not in result.stderr
    for written in (result.stdout.decode(), result.stderr.decode(), log):
        assert "ED@host" not in written
        assert "PLANT" not in written
    assert b"https://***@host/" in result.stderr


def test_outside_of_a_project_no_log_is_made(tmp_path):
    script = (
        "from qwen_vl_lora.session.console import prepare_terminal, show_messages_for_expected_errors\n"
        "from qwen_vl_lora.exceptions import ParameterError\nprepare_terminal()\n"
        "show_messages_for_expected_errors()\nraise ParameterError('wrong')\n"
    )
    result, _ = start(script, tmp_path)
    assert b"Error: wrong" in result.stderr
    assert not (tmp_path / "logs").exists()


def test_the_log_lies_in_the_project_from_its_subfolders_too(tmp_path):
    project = make_project(tmp_path / "project")
    (project / "notebooks").mkdir()
    command = [sys.executable, "-m", "qwen_vl_lora", "runs", "no_such_run"]
    result = call(command, project / "notebooks")
    assert "Run not found: no_such_run" in result.stderr
    assert (project / "logs/errors.log").is_file()
    assert not (project / "notebooks/logs").exists()


def test_a_removed_working_directory_is_one_message(tmp_path):
    (tmp_path / "gone").mkdir()
    command = f"cd {tmp_path / 'gone'} && rmdir {tmp_path / 'gone'} && {sys.executable} -m qwen_vl_lora runs"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert "The current folder no longer exists" in result.stderr
    assert "Traceback" not in result.stderr
    assert result.returncode == 1


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("path", [None, "data/x", "/nowhere/at/all", b"data", "a" * 5000, "a\0b"])
def test_a_fault_is_told_where_nothing_can_be_looked_at(tmp_path, monkeypatch, number, path):
    def no_folder():
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    monkeypatch.setattr(tempfile, "gettempdir", no_folder)
    assert isinstance(machine_fault(OSError(number, "x", path)), MachineError)
    assert isinstance(expected_error(OSError(number, "x", path)), MachineError)


def test_a_hostile_record_is_listed_and_compared_as_text(tmp_path):
    project = make_project(tmp_path / "project")
    hostile = "[bold]\x1b]0;owned\x07[/bold] \u202e :cat: \x9b2J\r"
    for name in ("r1", "r2"):
        folder = project / "data/08_reporting/tiny/runs" / name
        folder.mkdir(parents=True)
        facts = {
            "format": 1,
            "id": name,
            "recipe": "tiny",
            "pipelines": [hostile],
            "outcome": "failed",
            "message": hostile,
            "started": hostile,
            "parameters": {"prompt": {"user": hostile + name}, hostile: name},
            "results": {},
            "datasets": {"read": {}, "written": {}},
        }
        (folder / "record.json").write_text(json.dumps(facts))
    for arguments in (["runs", "r1", "r2"], ["runs", "\x1b]0;x\x07"]):
        result = call([sys.executable, "-m", "qwen_vl_lora", *arguments], project)
        assert acts(result.stdout.encode()) == acts(result.stderr.encode()) == []
        assert "\r" not in result.stdout
    assert r"\x1b]0;x\x07" in result.stderr


def test_a_source_that_cannot_be_read_leaves_no_password(tmp_path):
    project = make_project(tmp_path / "project")
    source = "https://user:p@PLANTED:9@nowhere.invalid/c.csv?sig=PLANTED%2F"
    result = call(kedro_run("data_engineering", env="own_captions", captions_file=source), project)
    assert result.returncode == 1
    written = [path for path in project.rglob("*") if path.is_file()]
    assert project / "logs/errors.log" in written
    assert [path for path in written if b"PLANTED" in path.read_bytes()] == []
    assert "PLANTED" not in result.stdout + result.stderr
    assert "nowhere.invalid" in result.stderr


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("unshare") is None or os.geteuid() != 0, reason="mounting a disk needs root")
@pytest.mark.skipif(sys.prefix.startswith(("/tmp/", "/var/tmp/")), reason="the disk would hide this environment")
def test_a_run_whose_every_folder_for_temporary_files_is_full_ends_in_one_message(tmp_path):
    project = make_project(tmp_path / "project")
    script = (
        "mount -t tmpfs -o size=3m none /mnt; cp -r . /mnt/p; mkdir -m 1777 /mnt/t; mount --bind /mnt/t /var/tmp; "
        "mount --bind /mnt/t /tmp; cd /mnt/p; dd if=/dev/zero of=/mnt/filler bs=64K 2>/dev/null || true; exec "
    )
    command = " ".join(kedro_run("data_engineering"))
    result = call(["unshare", "-m", "bash", "-ec", script + command], project)
    assert "No space left to write" in result.stderr
    assert "Traceback" not in result.stdout + result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("redirect", [">&- 2>&- <&-", ">/dev/null 2>&-"])
def test_a_run_goes_through_without_streams(tmp_path, redirect):
    project = make_project(tmp_path / "project")
    command = " ".join(kedro_run("data_engineering"))
    assert call(["bash", "-c", f"{command} {redirect}"], project).returncode == 0
    assert list(Path(project / "data/05_model_input").rglob("split_summary.json"))
