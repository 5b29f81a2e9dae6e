"""Pictures by address in a whole `kedro run`, with the rules as they are.

The run lives in a network of its own, where `pictures.example` is an address of the internet and the
picture server has it: nothing of the project is told that this is a test.
"""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hub.picture_server import CERTIFICATE
from hub.test_recipes import Machine
from samples.pictures import jpeg, write

OWN_NETWORK = ["unshare", "--map-root-user", "--net", "--mount"]
ADDRESS = "93.184.215.14"  # of the internet, and here of nobody but the picture server

RUN = """
set -e
ip link set lo up
ip addr add {address}/32 dev lo
echo "{address} pictures.example" > "$FOLDER/hosts"
mount --bind "$FOLDER/hosts" /etc/hosts
exec "$PYTHON" -m hub.test_urls_in_a_run "$@"
"""


def serve_and_run(project: str, *arguments: str) -> None:
    """Inside the network: start the server on the port of https, run, and print what was asked."""
    from hub.picture_server import PictureServer

    with PictureServer(ADDRESS, 443) as server:
        for seed in range(12):
            server.answers[f"/{seed}.jpg"] = lambda request, seed=seed: request.give(jpeg(seed))
        server.answers["/moved.jpg"] = lambda request: request.give(b"", 302, to="https://pictures.example/0.jpg")
        server.answers["/inside.jpg"] = lambda request: request.give(b"", 302, to="https://127.0.0.1/0.jpg")
        server.answers["/large.jpg"] = lambda request: request.give(b"x" * 200_000)
        server.answers["/gone.jpg"] = lambda request: request.give(b"", 404)
        child = subprocess.run([sys.executable, "-m", "kedro", "run", *arguments], cwd=project, check=False)
        print("asked:", " ".join(server.asked), flush=True)
    sys.exit(child.returncode)


@pytest.fixture
def run_with_pictures(tmp_path):
    """`run_with_pictures("--env", …)`: exit status and what was said, the server's requests last."""
    tried = shutil.which("unshare") and subprocess.run([*OWN_NETWORK, "true"], capture_output=True, check=False)
    if not tried or tried.returncode:
        pytest.skip("this machine gives no network of one's own")
    machine = Machine(tmp_path, {"MODELSCOPE_CACHE": str(tmp_path / "cache")})
    python_path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = machine.environment | {
        "FOLDER": str(tmp_path),
        "PYTHON": sys.executable,
        "PYTHONPATH": python_path,
        "SSL_CERT_FILE": str(CERTIFICATE),
    }

    def run(*arguments: str) -> tuple[int, str]:
        command = [*OWN_NETWORK, "bash", "-c", RUN.format(address=ADDRESS), "bash", str(machine.project), *arguments]
        child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
        return child.returncode, " ".join((child.stderr + child.stdout).split())

    run.machine = machine
    return run


def test_urls_of_a_table_are_fetched_once_and_the_others_rejected_with_their_reason(run_with_pictures):
    machine = run_with_pictures.machine
    names = [*(f"{seed}.jpg" for seed in range(12)), "moved.jpg", "inside.jpg", "large.jpg", "gone.jpg"]
    rows = [(f"https://pictures.example/{name}", f"Caption {name}") for name in names]
    rows += [("http://pictures.example/1.jpg", "Again 1."), ("https://elsewhere.example/a.jpg", "Of nobody.")]
    lines = "\n".join(f"{address},{caption}" for address, caption in [("image_path", "caption"), *rows])
    write(machine.project / "captions.csv", lines.encode())
    settings = "image.allow_urls=true,image.url_hosts=[pictures.example],image.url_max_bytes=100000"
    arguments = ("--env", "own_captions", "--pipeline", "data_engineering", "--params")
    given = f"captions_file=captions.csv,quarantine.max_share=0.5,{settings}"

    status, said = run_with_pictures(*arguments, given)
    assert status == 0, said[-3000:]
    assert sum(machine.load("05_model_input/own_captions/split_summary.json")["samples"].values()) == 14
    with machine.newest("02_intermediate/own_captions/rejected_samples.csv").open(
        encoding="utf-8", newline=""
    ) as table:
        rejected = {int(row["row"]): (row["reason"], row["detail"]) for row in csv.DictReader(table)}
    assert {row: reason for row, (reason, _) in rejected.items()} == {
        14: "url_not_allowed",
        15: "file_too_large",
        16: "missing_image",
        18: "url_not_allowed",
    }
    assert "127.0.0.1" in rejected[14][1]
    assert "404" in rejected[16][1]
    assert "add it to image.url_hosts" in rejected[18][1]
    asked = said.partition("asked:")[2].split()
    assert sorted(asked) == sorted(
        [f"pictures.example/{name}" for name in names] + ["pictures.example/0.jpg", "pictures.example/1.jpg"]
    )

    status, said = run_with_pictures(*arguments, given)
    assert status == 0, said[-3000:]
    assert sorted(said.partition("asked:")[2].split()) == [
        f"pictures.example/{name}" for name in ("gone.jpg", "inside.jpg", "large.jpg")
    ]


def test_urls_are_off_in_a_run_that_does_not_ask_for_them(run_with_pictures):
    machine = run_with_pictures.machine
    write(machine.project / "captions.csv", b"image_path,caption\nhttps://pictures.example/0.jpg,A dog.\n")
    arguments = ("--env", "own_captions", "--pipeline", "data_engineering", "--params", "captions_file=captions.csv")
    status, said = run_with_pictures(*arguments)
    assert status != 0
    assert "url_not_allowed" in said
    assert said.endswith("asked:")
    assert "collect_samples:" not in said


if __name__ == "__main__":
    serve_and_run(*sys.argv[1:])
