"""The run on a bare GPU host keeps its order and its minutes, loses nothing, and brings what it imports."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
ORIGIN = {"code": "one", "commit": "abc", "machine": "a machine", "versions": {}}
STARTED_IN_PROCESSES = ("tutorial", "judge", "gpu_box.tasks", "worker")


@pytest.fixture(autouse=True)
def benchmarks_importable(monkeypatch):
    monkeypatch.syspath_prepend(str(PROJECT))


@pytest.fixture
def carry_out(tmp_path):
    """`carry_out` into a file; gives part and state of each line that it holds then."""
    from benchmarks.gpu_box import ledger

    def call(parts, minutes=1.0, code="one"):
        file = tmp_path / "gpu.jsonl"
        made = [ledger.Part(name, seconds, work) for name, seconds, work in parts]
        assert ledger.carry_out(made, file, minutes, {**ORIGIN, "code": code}) == ledger.read_lines(file)
        return [(line["part"], line["state"]) for line in ledger.read_lines(file)]

    return call


def fail():
    raise RuntimeError("out of luck")


def skip():
    from benchmarks.gpu_box.ledger import SkippedError

    raise SkippedError("no such package")


def must_not_run():
    pytest.fail("done before")


def test_parts_are_done_in_order_and_a_failed_one_stops_no_other(carry_out, tmp_path):
    parts = [("first", 0, lambda: {"ms": 2}), ("second", 0, fail), ("third", 0, skip), ("fourth", 0, dict)]
    lines = [("first", "done"), ("second", "failed"), ("third", "skipped"), ("fourth", "done")]
    assert carry_out(parts) == lines
    log = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    assert re.search(r"## first: done, [\d.]+ s\n\n- ms: 2\n", log)
    assert '- reason: "RuntimeError: out of luck"' in log
    assert '- reason: "no such package"' in log


def test_a_second_call_does_what_failed_and_what_is_missing_only(carry_out):
    done = [("first", "done"), ("second", "failed"), ("third", "skipped")]
    assert carry_out([("first", 0, dict), ("second", 0, fail), ("third", 0, skip)]) == done
    again = [("first", 0, must_not_run), ("second", 0, dict), ("third", 0, must_not_run), ("fourth", 0, dict)]
    assert carry_out(again) == [*done, ("second", "done"), ("fourth", "done")]


def test_a_part_waits_for_those_whose_results_it_reads(tmp_path):
    from benchmarks.gpu_box.ledger import Part, carry_out

    def parts(first):
        return [Part("first", 0, first), Part("second", 0, lambda: {"ms": 2}, needs=("first",))]

    file = tmp_path / "gpu.jsonl"
    assert [line["state"] for line in carry_out(parts(fail), file, 1, ORIGIN)] == ["failed"]
    assert [line["state"] for line in carry_out(parts(dict), file, 1, ORIGIN)] == ["failed", "done", "done"]


def test_results_of_other_code_do_not_count(carry_out):
    assert carry_out([("first", 0, dict)], code="another") == [("first", "done")]
    assert carry_out([("first", 0, dict)]) == [("first", "done"), ("first", "done")]


def test_what_does_not_fit_in_the_minutes_is_left_out_for_a_shorter_part(carry_out):
    assert carry_out([("long", 61, must_not_run), ("short", 1, dict)]) == [("short", "done")]


def test_the_end_of_the_time_ends_the_part_and_its_process_and_keeps_what_was_done(carry_out, tmp_path):
    def sleep():
        code = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(600)"
        subprocess.run([sys.executable, "-c", code], check=True)

    before = signal.getsignal(signal.SIGTERM)
    lines = carry_out([("first", 0, dict), ("second", 0, sleep), ("third", 0, must_not_run)], minutes=1.5 / 60)
    assert lines == [("first", "done"), ("second", "cut off")]
    assert signal.getsignal(signal.SIGTERM) is before
    if (tmp_path / "pid").exists():  # not on a machine that took longer to start Python
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / "pid").read_text()), 0)
    assert carry_out([("first", 0, must_not_run), ("second", 0, dict)])[-1] == ("second", "done")


def test_sigterm_counts_as_the_end_of_the_time(carry_out):
    def ask_to_end():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    assert carry_out([("first", 0, ask_to_end), ("second", 0, must_not_run)]) == [("first", "cut off")]


def test_the_parts_begin_with_the_proofs_and_have_names_of_their_own(tmp_path):
    from benchmarks.gpu_box.parts import Box

    parts = Box(tmp_path, rehearsed=False, file=tmp_path / "gpu.jsonl", code="one").parts()
    names = [part.name for part in parts]
    assert names[:3] == [
        "2b, bfloat16 against float32 on the CPU",
        "2b, 16 samples overfitted",
        "2b, killed and resumed",
    ]
    assert len(set(names)) == len(names)
    assert sum(part.seconds for part in parts[:7]) <= 540  # the proofs and the headline job fit in one command
    assert names.index("2b, same work") < min(names.index(name) for name in names if name.startswith("7b"))


def test_mfu_counts_the_plain_methods_operations():
    from benchmarks.gpu_box.flops import utilization
    from benchmarks.gpu_box.parts import JOBS

    run = {"check": {"tokens": 1000, "scored_tokens": 100}, "train_s": 2.0}
    layer = 2 * 1536**2 + 2 * 1536 * 256 + 3 * 1536 * 8960
    tower_layer = 4 * 1280**2 + 8 * 1280**2
    flops = 2 * (4 * 28 * layer * 1000 + 4 * 1536 * 151_936 * 100) + 2 * 32 * tower_layer * 496 * 400
    found = utilization(JOBS["2b"], run, peak_tflops=100)
    assert found == {"model_flops": flops, "mfu": round(flops / 2e14, 4), "samples_per_second": 496.0}


def host_packages():
    """Normalized names of what a bare GPU host has: `host.txt` and what its packages need."""
    text = (PROJECT / "benchmarks" / "gpu_box" / "host.txt").read_text(encoding="utf-8")
    waiting = {line.partition("==")[0] for line in text.splitlines() if not line.startswith("#")}
    found: set[str] = set()
    while waiting:
        name = waiting.pop()
        try:
            needed = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # for another system
        found.add(normalized(name))
        plain = {re.match(r"[\w.-]+", one)[0] for one in needed if "extra ==" not in one}
        waiting |= {one for one in plain if normalized(one) not in found}
    return found - brought_packages()  # the rehearsal removes pydantic, which typer brings along


def brought_packages():
    text = (PROJECT / "benchmarks" / "gpu_box" / "brought.txt").read_text(encoding="utf-8")
    return {normalized(line) for line in text.splitlines() if not line.startswith("#")}


def normalized(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def test_what_is_brought_is_locked_and_not_there_already():
    files = ("requirements.txt", "requirements-vocabulary.txt")
    locked = "".join((PROJECT / file).read_text(encoding="utf-8") for file in files)
    assert brought_packages() <= {normalized(name) for name in re.findall(r"^([\w.-]+)==", locked, re.MULTILINE)}
    assert {"torch", "transformers", "numpy", "pandas", "rich", "pyyaml"} <= host_packages()


def imported_at_the_top(*modules):
    """Packages that these modules import when they are imported, through modules of this repository too."""
    waiting, read, packages = set(modules), set(), set()
    while waiting:
        name = waiting.pop()
        top = name.partition(".")[0]
        if top not in ("benchmarks", "qwen_vl_lora"):
            packages.add(top)
            continue
        place = (PROJECT if top == "benchmarks" else PROJECT / "src").joinpath(*name.split("."))
        file = next((one for one in (place.with_suffix(".py"), place / "__init__.py") if one.is_file()), None)
        if file is None:  # a name in a module
            continue
        read.add(name)
        found = {name.rpartition(".")[0]} if "." in name else set()
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        waiting |= found - read
    return packages - sys.stdlib_module_names


def test_every_package_that_the_processes_import_is_on_the_host_or_brought():
    modules = [f"benchmarks.{name}" for name in (*STARTED_IN_PROCESSES, "gpu_box.parts")]
    packages = imported_at_the_top(*modules)
    assert {"torch", "pydantic", "kedro", "datasets"} <= packages
    named = importlib.metadata.packages_distributions()
    distributions = {normalized(one) for package in packages for one in named[package]}
    assert distributions <= host_packages() | brought_packages()


def link_packages(names, folder):
    """Links to all files of these packages, as the only ones of an environment."""
    for name in names:
        for file in importlib.metadata.files(name) or []:
            link = folder / file.parts[0]
            if file.parts[0] not in ("..", "bin") and not link.exists():
                link.symlink_to(importlib.metadata.distribution(name).locate_file(file.parts[0]))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_what_is_brought_is_all_that_the_processes_need_beside_the_hosts_packages(tmp_path):
    link_packages(host_packages() | brought_packages(), tmp_path)
    modules = ", ".join(f"benchmarks.{name}" for name in STARTED_IN_PROCESSES)
    code = (
        f"import importlib.metadata, json, sys; import {modules}; from kedro.config import OmegaConfigLoader; "
        "benchmarks.worker.import_models(1); "
        "named = importlib.metadata.packages_distributions(); "
        "tops = {name.partition('.')[0] for name in sys.modules}; "
        "print(json.dumps(sorted({one for top in tops for one in named.get(top, ())})))"
    )
    environment = {**os.environ, "PYTHONPATH": f"{PROJECT}:{PROJECT / 'src'}:{tmp_path}"}
    command = [sys.executable, "-S", "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    imported = {normalized(name) for name in json.loads(done.stdout.splitlines()[-1])}
    assert brought_packages() - imported == {"dashscope"}  # read, never imported


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_the_rehearsal_runs_through_with_a_cut_off_and_a_second_call(tmp_path):
    def rehearse(minutes):
        command = [sys.executable, "-m", "benchmarks.gpu_box", "--rehearse", f"--minutes={minutes}"]
        command += ["--work", str(tmp_path / "work"), "--out", str(tmp_path)]
        code = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False).returncode
        (file,) = tmp_path.glob("*.jsonl")
        return code, [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]

    _, cut = rehearse(2)
    code, lines = rehearse(40)
    assert lines[: len(cut)] == cut
    assert code == 0
    last = {line["part"]: line for line in lines}
    assert all(line["state"] in ("done", "skipped") and not line.get("failures") for line in last.values())
    assert last["2b, killed and resumed"]["resumed_from"].startswith("checkpoint-")
    assert last["7b, same work"]["tensors_equal"]
