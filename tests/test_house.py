"""`scripts/house.py` on small packages whose figures are counted by hand."""

import subprocess
import sys

import pytest

from conftest import PROJECT

SCRIPT = PROJECT / "scripts" / "house.py"

PYPROJECT = """
[tool.importlinter]
root_package = "toy"
[[tool.importlinter.contracts]]
name = "Floors"
type = "layers"
layers = ["toy.pipelines", "toy.fit | toy.loop", "toy.settings"]
"""

SETTINGS = '''
"""Blocks and their whole."""
from dataclasses import dataclass

@dataclass
class Block:
    rate: float

    def halved(self):
        return Block(self.rate / 2)

@dataclass
class Settings:
    block: Block
    seed: int
'''

PIPELINE = """
from kedro.pipeline import Pipeline, node
from toy.pipelines.training.nodes import train_adapter

def create_pipeline():
    return Pipeline([node(train_adapter, inputs=["images", "params:settings"], outputs="adapter")])
"""

NODES = """
from toy.settings import Settings

def train_adapter(images: list, settings: Settings) -> dict:
    from toy.fit import fit
    return fit(images, settings)
"""

FIT = """
def fit(images, settings):
    return {}
"""


@pytest.fixture
def measure(tmp_path, monkeypatch):
    """Of a toy package with these modules besides the common ones: its figures and lists."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    import house

    def of(modules):
        return house.measure(write(tmp_path, modules))

    return of


def write(root, modules):
    common = {"": "", "settings": SETTINGS, "pipelines.training.pipeline": PIPELINE, "pipelines.training.nodes": NODES}
    (root / "pyproject.toml").write_text(PYPROJECT)
    for name, text in {**common, "fit": FIT, **modules}.items():
        path = root.joinpath("src", "toy", *name.split(".")) if name else root / "src" / "toy" / "__init__"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".py").write_text(text)
    return root


def test_statements_files_and_docstrings_are_counted(measure):
    before, _ = measure({"other": ""})
    after, _ = measure({"other": '"""One."""\nx = 1; y = 2\n\ndef four():\n    """Five."""\n    return 6\n'})
    assert after["statements"] - before["statements"] == 6
    assert (before["files"], before["functions"], after["functions"]) == (6, 4, 5)
    assert before["functions without docstring, %"] == 100
    assert after["functions without docstring, %"] == 80


def test_parameters_are_all_but_self(measure):
    figures, lists = measure({"other": "class A:\n    def many(self, a, /, b, *c, d=1, **e): ...\n"})
    assert figures["most parameters of one function"] == 5
    assert lists["Most parameters"][:2] == ["  5 toy.other: many", "  2 toy.pipelines.training.nodes: train_adapter"]


def test_bodies_are_counted_without_docstrings(measure):
    body = "".join(f"    x = {line}\n" for line in range(7))
    figures, _ = measure({"other": f'def long():\n    """Says\n    much."""\n\n    # why\n{body}\n\ny = 1\n'})
    assert figures["function body, lines, longest"] == 7
    assert figures["function body, lines, p90"] == 7  # 1, 1, 1, 2 and 7


def test_inputs_of_pipelines_are_counted_where_they_stand(measure):
    more = "INPUTS = ['params:a', 'b', 'params:c']\n"
    figures, _ = measure({"pipelines.more": more, "elsewhere": more})
    assert figures["params: inputs of all pipelines"] == 3


def test_files_name_quantization_as_a_word_or_in_code(measure):
    modules = {
        "one": "quantization = 1\n",
        "two": "def f(quantization): ...\n",
        "three": "x.quantization\n",
        "four": "f(quantization=1)\n",
        "five": "x['quantization']\n",
        "six": "from a import quantization as q\n",
        "seven": "raise ValueError('set quantization: null')\n",
        "eight": "x['rows']\n",
    }
    figures, _ = measure(modules)
    assert figures["files that name quantization"] == 7
    assert figures["files that name quantization in code"] == 6


def test_circles_go_through_functions_and_relative_imports_but_not_through_type_checking(measure):
    modules = {
        "a": "from toy import b\n",
        "b": "def f():\n    from .c import x\n",
        "c": "import toy.a\n",
        "d": "from toy.e import x\n",
        "e": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from toy.d import y\nelse:\n    y = 1\n",
    }
    figures, lists = measure(modules)
    assert lists["Circles"] == ["toy.a - toy.b - toy.c"]
    assert lists["Imports under TYPE_CHECKING"] == ["toy.e -> toy.d"]
    assert (figures["circles between files"], figures["circles, TYPE_CHECKING included"]) == (1, 2)


def test_modules_outside_the_layers_are_listed_with_their_lines(measure):
    figures, lists = measure({"loop": "", "settings_more": "x = 1\ny = 2\n"})
    assert lists["Modules in no layer"] == ["toy.settings_more"]
    assert (figures["modules in no layer"], figures["lines of modules in no layer"]) == (1, 2)


def test_small_files_with_one_importer_are_listed(measure):
    shared = "from toy import small, large\n"
    modules = {"small": "x = 1\n", "large": "x = 1\n" * 60, "both": "", "a": f"{shared}import toy.both\n"}
    _, lists = measure({**modules, "b": "import toy.both\n"})
    small = lists["Files under 60 lines with one importer"]
    assert "toy.small <- toy.a" in small
    assert not {"toy.large", "toy.both", "toy.a"} & {line.split()[0] for line in small}


def test_files_of_one_name_are_listed_and_packages_are_none(measure):
    _, lists = measure({"a.tables": "", "b.tables": "", "a.__init__": "", "b.a.__init__": ""})
    assert lists["Files of one name"] == ["tables: toy.a.tables, toy.b.tables"]


def test_what_the_training_node_reaches_is_counted_with_imports_in_functions(measure):
    figures, _ = measure({"fit": "def fit(images, settings):\n    import toy.loop\n", "loop": "", "other": ""})
    assert figures["modules behind the training node"] == 4  # nodes, settings, fit, loop
    lines = NODES.count("\n") + SETTINGS.count("\n") + 2
    assert figures["lines behind the training node"] == lines


WALKS = {
    "to a function and back": (FIT, {}, 3),
    "not to what receives no settings": (
        "from toy import loop\ndef fit(images, settings):\n    return loop.run(images)\n",
        {"loop": "def run(images): ...\n"},
        3,
    ),
    "not with a single value": (
        "from toy import loop\ndef fit(images, settings: Settings):\n    return loop.run(settings.block.rate)\n",
        {"loop": "def run(rate: float): ...\n"},
        3,
    ),
    "with a block, by the class of the argument": (
        "from toy import loop\nfrom toy.settings import Settings\n"
        "def fit(images, settings: Settings):\n    return loop.run(settings.block)\n",
        {"loop": "def run(block): ...\n"},
        5,
    ),
    "with a block, by the annotation of the parameter": (
        "from toy import loop\ndef fit(images, settings):\n    return loop.run(block=unknown(settings))\n",
        {"loop": "from toy.settings import Block\ndef run(block: Block | None = None): ...\n"},
        5,
    ),
    "not by an annotation of what is not given": (
        "from toy import loop\ndef fit(images, settings):\n    return loop.run()\n",
        {"loop": "from toy.settings import Block\ndef run(block: Block | None = None): ...\n"},
        3,
    ),
    "once into each function": (
        "from toy import loop\nfrom toy.settings import Settings\n"
        "def fit(images, settings: Settings):\n"
        "    loop.run(settings)\n    loop.run(settings)\n    loop.end(settings)\n",
        {"loop": "def run(settings): ...\ndef end(settings): ...\n"},
        7,
    ),
    "arguments before their call": (
        "from toy.loop import end, run\nfrom toy.settings import Settings\n"
        "def fit(images, settings: Settings):\n    return end(run(settings), settings)\n",
        {"loop": "def run(settings): ...\ndef end(ran, settings): ...\n"},
        7,
    ),
    "to a method of settings": (
        "from toy.settings import Settings\ndef fit(images, settings: Settings):\n    return settings.block.halved()\n",
        {},
        5,
    ),
    "to a method of a constructed object": (
        "from toy.loop import Loop\nfrom toy.settings import Settings\n"
        "def fit(images, settings: Settings):\n    loop = Loop.new()\n    loop.run(settings)\n",
        {
            "loop": "class Base:\n    def run(self, settings): ...\n"
            "class Loop(Base):\n    @classmethod\n    def new(cls) -> Self: ...\n"
        },
        5,
    ),
    "to a bundle of blocks, and on with it": (
        "from toy.loop import Bundle, run\nfrom toy.settings import Settings\n"
        "def fit(images, settings: Settings):\n    bundle = Bundle(settings.block, 1)\n    run(bundle)\n",
        {
            "loop": "from toy.settings import Block\nclass Bundle:\n    block: Block\n    size: int\n"
            "def run(bundle): ...\n"
        },
        7,
    ),
    "with arguments that are starred": (
        "from toy import loop\ndef fit(images, settings):\n    work = (images, settings)\n    loop.run(*work)\n",
        {"loop": "from toy.settings import Settings\ndef run(images, settings: Settings): ...\n"},
        5,
    ),
}


@pytest.mark.parametrize(("fit", "modules", "stays"), WALKS.values(), ids=WALKS)
def test_the_settings_are_followed(measure, fit, modules, stays):
    figures, _ = measure({"fit": fit, **modules})
    assert figures["stays while following the settings"] == stays


def test_returns_are_the_stays_that_are_not_the_first_in_their_file(measure):
    fit = "from toy import loop\nfrom toy.settings import Settings\n"
    fit += "def fit(images, settings: Settings):\n    return loop.run(settings)\n"
    figures, lists = measure({"fit": fit, "loop": "def run(settings): ...\n"})
    assert lists["Following the settings"] == [
        "toy.pipelines.training.nodes: train_adapter",
        "  toy.fit: fit",
        "    toy.loop: run",
    ]
    names = ("stays while following the settings", "files of these stays", "returns among these stays")
    assert tuple(figures[name] for name in names) == (5, 3, 2)


def test_a_check_fails_above_a_limit_and_shows_which(tmp_path):
    def check():
        command = [sys.executable, SCRIPT, "--root", tmp_path, "--check"]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    documented = "".join(f'def f{number}():\n    """One."""\n' for number in range(20))
    write(tmp_path, {"fit": f"{FIT}{documented}"})
    good = check()
    assert (good.returncode, good.stderr) == (0, ""), good.stdout
    assert "above" not in good.stdout
    write(
        tmp_path,
        {
            "fit": f"{FIT}{documented}",
            "pipelines.a": "from toy.pipelines import b",
            "pipelines.b": "import toy.pipelines.a",
        },
    )
    circle = check()
    assert circle.returncode == 1
    assert [line.split("  ")[0] for line in circle.stdout.splitlines() if line.endswith("above")] == [
        "circles between files"
    ]


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ({"pipelines.training.nodes": ""}, r"train_adapter not found in toy\.pipelines\.training\.nodes"),
        ({"pipelines.training.pipeline": ""}, "No pipeline has a node of train_adapter"),
        (
            {"pipelines.training.pipeline": PIPELINE.replace('["images", "params:settings"]', "INPUTS")},
            "train_adapter: expected inputs that are literals",
        ),
    ],
)
def test_a_project_whose_settings_cannot_be_followed_is_refused(measure, modules, message):
    with pytest.raises(SystemExit, match=message):
        measure(modules)
