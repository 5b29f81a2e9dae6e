"""What the documentation tells people to type exists, and what it links to is there."""

import ast
import json
import re
import shlex
import shutil
import sys
import warnings
from pathlib import Path
from typing import get_args

import click
import pytest
import yaml
from kedro.config import OmegaConfigLoader
from kedro.framework.project import find_pipelines
from kedro.framework.startup import bootstrap_project

from command_line import call
from docs.blocks import PAGES, PROJECT, anchors, blocks, links
from docs.no_nodes import REACHED
from finished_project import SLICE, finished_project
from qwen_vl_lora.parameters import validate_parameters
from qwen_vl_lora.samples.records import Reason
from qwen_vl_lora.session.given_parameters import split_params
from qwen_vl_lora.settings import CONFIG_LOADER_ARGS

MARKS = {"", "gpu", "hub", "long", "other"}
SHELL = {"source", "pip", "python", "python3", "git", "cd", "export", "docker", "scp", "open", "pre-commit", "uv"}
"""Programs whose commands are not ours to check."""

SHELL_BLOCKS = [block for block in blocks("bash", "sh", "shell", "console") if block.mark != "other"]
COMMANDS = [
    pytest.param(command, id=f"{block.id} {command[:50]}") for block in SHELL_BLOCKS for command in block.commands
]
TABLES = {
    "captions.csv": "image_path,caption",
    "path/to/captions.csv": "image_path,caption",
    "path/to/table.csv": "image_path,caption",
    "t.csv": "Datei,Beschreibung",
}
"""Files that the commands name → their first line."""

IN_THE_SHELL = ("source ", "eval ")
"""Commands that change the shell that they are typed in."""


@pytest.fixture(scope="module")
def pipelines():
    bootstrap_project(PROJECT)
    return {"__default__", *find_pipelines(raise_errors=True)}


@pytest.fixture(scope="module")
def project(tmp_path_factory, base_path):
    """A project with one finished run, whose parameters it states, and a table; the commands may change it."""
    project = finished_project(tmp_path_factory.getbasetemp(), base_path("qwen2_vl"))
    (project / "conf" / "local").mkdir(exist_ok=True)
    (project / "conf" / "local" / "parameters.yml").write_text(yaml.safe_dump(SLICE), encoding="utf-8")
    pictures = sorted((project / "data/02_intermediate/tiny/images/files").iterdir())[:12]
    for file, heading in TABLES.items():
        rows = [f"{picture},caption {number}" for number, picture in enumerate(pictures)]
        (project / file).parent.mkdir(parents=True, exist_ok=True)
        (project / file).write_text("\n".join([heading, *rows, ""]), encoding="utf-8")
    (project / "exclude.csv").write_text("row,image_id\n", encoding="utf-8")
    for folder in ("path/to/folder", "pictures", "coco"):
        (project / folder).mkdir()
    for number, picture in enumerate(pictures):
        shutil.copy(picture, project / "path/to/folder" / f"{number}{picture.suffix}")
        (project / "path/to/folder" / f"{number}.txt").write_text(f"caption {number}", encoding="utf-8")
    shutil.copy(pictures[0], project / "path/to/photo.jpg")
    shutil.copy(Path(__file__).with_name("no_nodes.py"), project)
    return project


@pytest.mark.parametrize("block", list(blocks("bash", "sh", "shell", "console")), ids=lambda block: block.id)
def test_a_fence_says_in_a_known_word_what_its_commands_need(block):
    assert block.mark in MARKS


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_names_what_exists(command, pipelines):
    for part in re.split(r"\s*(?:&&|\|\||\||;)\s*", re.sub(r"\s\d?>+\s*\S+", "", command)):
        words = [word for word in shlex.split(part) if not re.fullmatch(r"[A-Z_]+=\S*", word)]
        if words:
            _check(words, pipelines)


def _check(words, pipelines):
    program, *arguments = words
    if program.startswith(".venv/bin/"):
        program = program.removeprefix(".venv/bin/")
    if program == "make":
        targets = set(re.findall(r"^([a-z-]+):", (PROJECT / "Makefile").read_text(), re.MULTILINE))
        assert {word for word in arguments if "=" not in word and not word.startswith("-")} <= targets
    elif program == "qwen-vl-lora":
        from qwen_vl_lora.cli import cli

        _parse(cli, program, arguments)
    elif program == "kedro":
        _check_kedro(arguments, pipelines)
    else:
        assert program in SHELL or program.startswith(("./", "$")), f"{program}: not known; mark the block `bash other`"


def _check_kedro(arguments, pipelines):
    if arguments[:1] == ["run"]:
        from qwen_vl_lora.cli import cli

        options = _parse(cli, "kedro", arguments).params
        assert {*(options["pipelines"] or ()), *filter(None, [options["pipeline"]])} <= pipelines
        _check_parameters(options["env"], options["params"])
        return
    from kedro.framework.cli.cli import KedroCLI

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a plugin whose import warns would be left out
        _parse(KedroCLI(PROJECT), "kedro", arguments)


def _parse(command, name, arguments):
    """The context of the innermost command; click says what it does not know."""
    context = command.make_context(name, list(arguments), resilient_parsing="--help" in arguments or "-h" in arguments)
    rest = [*context._protected_args, *context.args] if hasattr(context, "_protected_args") else context.args
    if not isinstance(command, click.Group) or not rest:
        return context
    inner_name, inner, inner_arguments = command.resolve_command(context, rest)
    return _parse(inner, inner_name, inner_arguments)


def _check_parameters(env, given):
    if not isinstance(given, dict):
        given = split_params(click.Context(click.Command("run")), click.Option(["--params"]), given or "")
    loader = OmegaConfigLoader(str(PROJECT / "conf"), env=env or "local", runtime_params=given, **CONFIG_LOADER_ARGS)
    assert env is None or (PROJECT / "conf" / env).is_dir(), f"no recipe {env}"
    validate_parameters(dict(loader["parameters"]))
    assert loader["catalog"]


UNMARKED = sorted({command for block in SHELL_BLOCKS if not block.mark for command in block.commands})


@pytest.mark.parametrize("command", UNMARKED)
def test_every_command_without_a_mark_runs(command, project):
    """`qwen-vl-lora` to its end; `kedro run` to its first node, which other tests begin at."""
    if command.startswith(IN_THE_SHELL):
        return
    run = min(path.name for path in (project / "data/08_reporting/tiny/runs").iterdir())
    named = re.sub(r"\bRUN\b|\d{4}-\d\d-\d\dT[\d.]+Z", run, command.replace("=…", "=captions.csv").replace("…", ""))
    program, *arguments = shlex.split(named.replace("/data/", f"{project}/"))
    if program == "qwen-vl-lora":
        done = call([sys.executable, "-m", "qwen_vl_lora", *arguments], project)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.strip()
        return
    assert [program, arguments[0]] == ["kedro", "run"], f"{command}: mark its block, or run it here"
    done = call([sys.executable, "-m", "kedro", *arguments, "--runner", "no_nodes.NoNodes"], project)
    assert REACHED in done.stderr, done.stdout + done.stderr


@pytest.mark.parametrize("block", list(blocks("python", "yaml", "json", "csv")), ids=lambda block: block.id)
def test_code_that_is_shown_is_code(block):
    if block.language == "python":
        ast.parse(block.text)
    elif block.language == "yaml":
        yaml.safe_load(block.text)
    elif block.language == "json":
        try:
            json.loads(block.text)
        except json.JSONDecodeError:
            [json.loads(line) for line in block.text.splitlines()]  # JSON Lines


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(PROJECT)))
def test_links_lead_somewhere(page):
    for target in links(page):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(file), f"{page.name} links to {target}"


def _texts_of_source():
    """All texts of the package's code, f-strings with `…` for their values, in one line each."""
    for path in sorted((PROJECT / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value
            elif isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)


def _rows(heading, until):
    text = (PROJECT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    section = text.partition(f"{heading}\n")[2].partition(f"\n{until}")[0]
    return [line.split(" | ")[0].removeprefix("| ") for line in section.splitlines() if line.startswith("| `")]


def test_every_message_of_the_troubleshooting_page_is_one_that_the_code_says():
    spoken = "\n".join(_texts_of_source())
    text = (PROJECT / "docs" / "troubleshooting.md").read_text(encoding="utf-8").partition("## Kedro's own messages")[0]
    reasons = set(get_args(Reason))
    unknown = []
    for cell in re.findall(r"^\| (`.*?) \|", text, re.MULTILINE):
        for message in re.findall(r"``\s(.*?)\s``|`([^`]+)`", cell):
            pieces = [piece.strip() for piece in "".join(message).split("…")]
            unknown += [piece for piece in pieces if len(piece) > 5 and piece not in spoken and piece not in reasons]
    assert not unknown, "\n".join(unknown)


def test_every_reason_of_a_rejection_is_explained():
    rows = _rows("### Reasons in `rejected_samples`, `left_out_samples` and `captions.csv`", "## ")
    assert [row.strip("`") for row in rows] == list(get_args(Reason))


def test_the_folders_of_data_are_those_of_the_catalog():
    catalog = (PROJECT / "conf" / "base" / "catalog.yml").read_text(encoding="utf-8")
    page = (PROJECT / "data" / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"data/(\d\d_\w+)/", catalog)) <= set(re.findall(r"`(\d\d_\w+)`", page))


def test_both_readmes_tell_the_same():
    english, chinese = PROJECT / "README.md", PROJECT / "README.zh-CN.md"
    commands = [
        [command for block in blocks("bash") if block.page == page for command in block.commands]
        for page in (english, chinese)
    ]
    assert commands[0] == commands[1]
    texts = [page.read_text(encoding="utf-8") for page in (english, chinese)]
    levels, figures = (
        [re.findall(form, text, re.MULTILINE) for text in texts] for form in (r"^#+(?= )", r"!\[.*\]\((.*)\)")
    )
    assert levels[0] == levels[1]
    assert figures[0] == figures[1]
    numbers = [sorted(re.findall(r"\d[\d.,]*\d", re.sub(r"```.*?```", "", text, flags=re.DOTALL))) for text in texts]
    assert numbers[0] == numbers[1]
