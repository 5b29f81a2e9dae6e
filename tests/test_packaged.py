"""A packaged project: the wheel and the configuration archive of `kedro package`, in a folder with nothing else."""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import shutil
import site
import subprocess
import sys
import tarfile
import venv
from pathlib import Path

import pytest
from click.testing import CliRunner
from kedro.framework.cli import project as kedro_project
from kedro.framework.startup import bootstrap_project

from command_line import DATA_SLICE, TRAINING_SLICE, environment
from qwen_vl_lora.cli import OUTSIDE, cli
from qwen_vl_lora.exceptions import MissingArtifactError, ParameterError
from qwen_vl_lora.session import packaged
from qwen_vl_lora.session.packaged import own_configuration, unpacked

PROJECT = Path(__file__).parents[1]
GLOBALS = {"conf/base/globals.yml": b"recipe: tiny\n"}


def write_archive(file: Path, members: dict[str, bytes | tarfile.TarInfo]) -> Path:
    """A gzipped tar of files, or of members that are something else."""
    with tarfile.open(file, "w:gz") as archive:
        for name, content in members.items():
            member = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            member.name = name
            data = content if isinstance(content, bytes) else b""
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return file


def member(kind: bytes, target: str = "") -> tarfile.TarInfo:
    made = tarfile.TarInfo()
    made.type, made.linkname = kind, target
    return made


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder, in which the process is."""
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    return empty


def test_an_archive_becomes_the_configuration_of_a_folder_that_has_none(tmp_path, folder):
    archive = shutil.make_archive(str(tmp_path / "conf"), "gztar", PROJECT, "conf")
    assert unpacked(Path(archive), folder) == folder / "conf"
    assert (folder / "conf/base/catalog.yml").read_bytes() == (PROJECT / "conf/base/catalog.yml").read_bytes()
    assert [path.name for path in folder.iterdir()] == ["conf"]
    assert unpacked(Path(archive), folder) == folder / "conf"


def test_an_archive_never_changes_a_configuration_that_is_there(tmp_path, folder):
    unpacked(write_archive(tmp_path / "old.tar.gz", GLOBALS), folder)
    (folder / "conf/local").mkdir()
    (folder / "conf/local/credentials.yml").write_text("mine: {}\n")
    unpacked(tmp_path / "old.tar.gz", folder)
    new = write_archive(tmp_path / "new.tar.gz", {"conf/base/globals.yml": b"recipe: other\n"})
    with pytest.raises(ParameterError, match=r"new\.tar\.gz differs from .*conf: base/globals\.yml"):
        unpacked(new, folder)
    assert (folder / "conf/base/globals.yml").read_bytes() == GLOBALS["conf/base/globals.yml"]
    assert (folder / "conf/local/credentials.yml").is_file()


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"conf/base/link": member(tarfile.SYMTYPE, "/etc/passwd")}, "'conf/base/link' is not a plain file"),
        ({"conf/base/hard": member(tarfile.LNKTYPE, "conf/base/globals.yml")}, "'conf/base/hard' is not a plain file"),
        ({"conf/base/pipe": member(tarfile.FIFOTYPE)}, "'conf/base/pipe' is not a plain file"),
        ({"/conf/base/a.yml": b"a: 1"}, "'/conf/base/a.yml' lies elsewhere"),
        ({"conf/../../a.yml": b"a: 1"}, r"'conf/\.\./\.\./a.yml' lies elsewhere"),
        ({"data/06_models/a": b""}, "'data/06_models/a' lies elsewhere"),
        ({"conf": b"a file"}, "'conf' lies elsewhere"),
        ({"conf/base/big.yml": bytes(packaged.MAX_BYTES)}, "expected at most 20 MB unpacked"),
    ],
)
def test_an_archive_that_holds_more_than_files_of_a_configuration_is_refused(tmp_path, folder, members, message):
    archive = write_archive(tmp_path / "conf.tar.gz", GLOBALS | members)
    with pytest.raises(ParameterError, match=message):
        unpacked(archive, folder)
    assert not list(folder.iterdir())


def test_an_archive_without_a_configuration_or_damaged_is_refused(tmp_path, folder):
    archive = write_archive(tmp_path / "other.tar.gz", {"conf/readme.md": b"x"})
    with pytest.raises(
        ParameterError, match=r"expected the archive of `kedro package`, with conf/base/; got readme.md"
    ):
        unpacked(archive, folder)
    whole = write_archive(tmp_path / "conf.tar.gz", {"conf/base/a.yml": os.urandom(2000)}).read_bytes()
    plain = gzip.decompress(whole)
    for damaged in (whole[:900], b"conf", gzip.compress(plain[:900])):
        (tmp_path / "damaged.tar.gz").write_bytes(damaged)
        with pytest.raises(ParameterError, match=r"damaged\.tar\.gz cannot be read as an archive"):
            unpacked(tmp_path / "damaged.tar.gz", folder)
    assert not list(folder.iterdir())


def test_the_configuration_of_a_project_is_its_own_whatever_else_is_named(tmp_path, folder):
    assert own_configuration(tmp_path / "elsewhere", folder) == tmp_path / "elsewhere"
    (folder / "conf").mkdir()
    assert own_configuration(tmp_path / "elsewhere", folder) == folder / "conf"


def test_only_the_command_line_chooses_the_configuration_of_a_folder_that_has_none(tmp_path, folder):
    write_archive(folder / "conf.tar.gz", GLOBALS)
    (folder / "run.yml").write_text("run: {conf_source: conf.tar.gz}\n")
    done = CliRunner().invoke(cli, ["run", "--verbose", "--config", "run.yml"])
    assert isinstance(done.exception, ParameterError)
    assert "A file may not choose the configuration that is trusted" in str(done.exception)
    done = CliRunner().invoke(cli, ["run", "--verbose"])
    assert isinstance(done.exception, MissingArtifactError)
    assert "or --conf-source with the configuration of a packaged project" in str(done.exception)
    assert not (folder / "conf").exists()


@pytest.mark.parametrize(
    ("arguments", "taken"),
    [
        (["--conf-source=x.tar.gz"], ["run", "--conf-source=x.tar.gz"]),
        (["-v", "--pipeline", "training"], ["-v", "run", "--pipeline", "training"]),
        (["runs", "--json"], ["runs", "--json"]),
        (["--version"], ["--version"]),
        (["--unknown"], ["--unknown"]),
        ([], []),
    ],
)
def test_options_of_a_run_without_a_command_are_a_run(monkeypatch, arguments, taken):
    seen = []
    monkeypatch.setattr("click.Group.parse_args", lambda group, context, given: seen.append(given))
    cli.parse_args(None, arguments)
    assert seen == [taken]


@pytest.mark.parametrize("command", ["runs", "caption"])
def test_a_command_in_a_folder_that_is_no_project_says_so(folder, command):
    done = CliRunner().invoke(cli, [command, "x"], obj=OUTSIDE)
    assert f"qwen-vl-lora {command} must be called inside a project folder" in str(done.exception)


def package(tree: Path, monkeypatch) -> Path:
    """Run `kedro package` on the project's files, without a network; the folder of wheel and archive."""
    names = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=PROJECT, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    for name in names:
        if (PROJECT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(PROJECT / name, tree / name)
    call = kedro_project.call
    monkeypatch.setattr(
        kedro_project,
        "call",
        lambda words, **more: call([*words, "--no-isolation"] if "build" in words else words, **more),
    )
    with contextlib.chdir(tree):
        done = CliRunner().invoke(kedro_project.package, obj=bootstrap_project(tree))
    assert done.exit_code == 0, done.output
    return tree / "dist"


def environment_with(wheel: Path, folder: Path, surroundings: dict[str, str]) -> Path:
    """A virtual environment with the wheel, beside the packages of this one; its folder of programs."""
    venv.create(folder, symlinks=True)
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install", "--quiet", "--no-index"]
    subprocess.run([*pip, "--no-deps", str(wheel)], env=surroundings, check=True)
    own = next(folder.glob("lib/python*/site-packages"))
    (own / "shared.pth").write_text("\n".join(site.getsitepackages()))  # a .pth file does not read those it leads to
    return folder / "bin"


@pytest.mark.slow
def test_the_wheel_and_the_archive_run_in_an_empty_folder(tmp_path, folder, monkeypatch):
    (tmp_path / "tree").mkdir()
    dist = package(tmp_path / "tree", monkeypatch)
    surroundings = {name: value for name, value in environment().items() if name != "PYTHONPATH"}
    programs = environment_with(next(dist.glob("*.whl")), tmp_path / "venv", surroundings)
    shutil.copy(dist / "conf-qwen_vl_lora.tar.gz", folder)

    def call(*command: str) -> subprocess.CompletedProcess[str]:
        words = [str(programs / command[0]), *command[1:]]
        done = subprocess.run(words, cwd=folder, env=surroundings, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "usage data" not in done.stdout + done.stderr
        return done

    given = {**DATA_SLICE, **TRAINING_SLICE, "training_args.max_steps": 2}
    params = ",".join(f"{name}={value}" for name, value in given.items())
    first = ("--conf-source=conf-qwen_vl_lora.tar.gz", "--params", params)
    call("python", "-m", "qwen_vl_lora", *first)
    assert {path.name for path in folder.iterdir()} == {"conf", "conf-qwen_vl_lora.tar.gz", "data", "logs"}
    for artifact in ("06_models/tiny/adapter/*/adapter/adapter_model.safetensors", "08_reporting/tiny/latest/*.html"):
        assert list((folder / "data").glob(artifact)), artifact
    assert "artifacts: the same\nparameters: the same\n" in call("qwen-vl-lora", "verify", "latest").stdout
    assert "finished" in call("qwen-vl-lora", "runs").stdout
    picture = next((folder / "data/02_intermediate/tiny/images/files").iterdir())
    assert call("qwen-vl-lora", "caption", str(picture)).stdout.strip()
    call("qwen-vl-lora", first[0], "--pipeline", "data_engineering", *first[1:])
    assert call("qwen-vl-lora", "runs").stdout.count("finished") == 2
