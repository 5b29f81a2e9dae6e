"""How simple the whole is: `scripts/house.py [--root PATH] [--check] [--lists]`.

Everything is read from the source and nothing of the package is imported, so any two trees can be compared. The
package is the root package of the import contracts in pyproject.toml, below `src`. What the figures mean:

- statements: `ast.stmt` nodes, docstrings included.
- parameters: those of one function, `*args` and `**kwargs` included, `self` and `cls` not.
- `params:` inputs: string constants that begin with `params:`, in modules of `pipelines`.
- files that name `quantization`: the word stands anywhere in them; in code: as an identifier, an attribute, a
  keyword, an imported name or a whole string.
- imports: at any depth of a file, functions included. A package's `__init__` is a file like any other; importing a
  module does not import its package. Imports under TYPE_CHECKING count where a figure says so, and as importers.
- circles: strongly connected components of two or more files.
- no layer: outside all layers of the import contracts; the root package's `__init__` is not counted.
- body: the lines from a function's first statement to its last, without the docstring; p90 by nearest rank.
- stays and returns: see `source_tree.py`.
"""

from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Mapping
from pathlib import Path

from source_tree import TRAINING_MODULE, Function, Package, Walk, parameters

LIMITS: dict[str, float] = {
    "statements": 14_294,  # 90 % of the tree before the rebuild
    "files": 140,
    "functions without docstring, %": 41.8,  # as before the rebuild
    "most parameters of one function": 8,
    "params: inputs of all pipelines": 12,
    "files that name quantization": 10,
    "circles between files": 0,
    "modules in no layer": 0,
    "function body, lines, p90": 20,
    "function body, lines, longest": 60,
    "stays while following the settings": 30,
}
"""The most that a figure may be. Figures without a limit are for information."""

SETTING = "quantization"
SMALL = 60
"""A file of fewer lines is listed if it has a single importer."""

Measured = tuple[dict[str, float], dict[str, list[str]]]
"""Figures by name, and lists of what is behind them."""

Graph = Mapping[str, set[str]]


def measure(root: Path) -> Measured:
    """What a project has.

    Raises:
        SystemExit: if the project has no training node, or no pipeline gives it settings.
    """
    package = Package(root)
    runs, typed = package.imports(type_checking=False), package.imports(type_checking=True)
    parts = [_of_functions(package), _of_names(package), _of_imports(package, runs, typed), _of_walk(package, runs)]
    figures: dict[str, float] = {
        "statements": sum(isinstance(node, ast.stmt) for _, node in package.nodes),
        "files": len(package.trees),
    }
    lists: dict[str, list[str]] = {}
    for more_figures, more_lists in parts:
        figures |= more_figures
        lists |= more_lists
    return figures, lists


def _of_functions(package: Package) -> Measured:
    functions = package.functions
    bare = sum(not ast.get_docstring(node) for _, node in functions)
    bodies = sorted((_body_lines(node), f"{module}: {node.name}") for module, node in functions)
    many = sorted((len(parameters(node)), f"{module}: {node.name}") for module, node in functions)
    figures: dict[str, float] = {
        "functions": len(functions),
        "functions without docstring, %": round(100 * bare / len(functions), 1),
        "most parameters of one function": many[-1][0],
        "function body, lines, p90": bodies[-(-9 * len(bodies) // 10) - 1][0],
        "function body, lines, longest": bodies[-1][0],
    }
    return figures, {
        "Most parameters": [f"{count:3} {name}" for count, name in reversed(many[-5:])],
        "Longest bodies": [f"{count:3} {name}" for count, name in reversed(bodies[-5:])],
    }


def _body_lines(function: Function) -> int:
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def _of_names(package: Package) -> Measured:
    wired = [vars(node).get("value") for module, node in package.nodes if ".pipelines." in f"{module}."]
    anywhere = {module for module, text in package.texts.items() if SETTING in text}
    in_code = {module for module, node in package.nodes if SETTING in _words(node)}
    stems: dict[str, list[str]] = {}
    for module in package.files:
        stems.setdefault(module.rpartition(".")[2], []).append(module)
    alike = {stem: modules for stem, modules in sorted(stems.items()) if len(modules) > 1}
    figures: dict[str, float] = {
        "params: inputs of all pipelines": sum(str(value).startswith("params:") for value in wired),
        f"files that name {SETTING}": len(anywhere),
        f"files that name {SETTING} in code": len(in_code),
        "file names that occur more than once": len(alike),
    }
    return figures, {
        f"Files that name {SETTING}": sorted(anywhere),
        "Files of one name": [f"{stem}: {', '.join(modules)}" for stem, modules in alike.items()],
    }


def _words(node: ast.AST) -> list[object]:
    return [vars(node).get(key) for key in ("id", "arg", "attr", "name", "asname", "value")]


def _of_imports(package: Package, runs: Graph, typed: Graph) -> Measured:
    both = {module: runs[module] | typed[module] for module in runs}
    importers = {module: [other for other in both if module in both[other]] for module in package.files}
    lone = [module for module in package.files if package.lines[module] < SMALL and len(importers[module]) == 1]
    circles, loose = _circles(runs), _in_no_layer(package)
    figures: dict[str, float] = {
        "circles between files": len(circles),
        "circles, TYPE_CHECKING included": len(_circles(both)),
        "modules in no layer": len(loose),
        "lines of modules in no layer": sum(package.lines[module] for module in loose),
        f"files under {SMALL} lines with one importer": len(lone),
    }
    return figures, {
        "Circles": [" - ".join(circle) for circle in circles],
        "Imports under TYPE_CHECKING": [f"{module} -> {name}" for module in typed for name in sorted(typed[module])],
        "Modules in no layer": loose,
        f"Files under {SMALL} lines with one importer": [f"{name} <- {importers[name][0]}" for name in lone],
    }


def _of_walk(package: Package, runs: Graph) -> Measured:
    walk = Walk(package)
    reached = _reachable(runs, f"{package.name}.{TRAINING_MODULE}")
    figures: dict[str, float] = {
        "modules behind the training node": len(reached),
        "lines behind the training node": sum(package.lines[module] for module in reached),
        "stays while following the settings": len(walk.stays),
        "files of these stays": len(set(walk.stays)),
        "returns among these stays": len(walk.stays) - len(set(walk.stays)),
    }
    return figures, {"Following the settings": walk.calls}


def _reachable(graph: Graph, start: str) -> set[str]:
    found, left = {start}, [start]
    while left:
        new = graph[left.pop()] - found
        found |= new
        left += new
    return found


def _circles(graph: Graph) -> list[list[str]]:
    reach = {module: _reachable(graph, module) for module in graph}
    parts = {frozenset(other for other in reach[module] if module in reach[other]) for module in graph}
    return sorted(sorted(part) for part in parts if len(part) > 1)


def _in_no_layer(package: Package) -> list[str]:
    layers = set()
    for contract in package.contracts:
        for container in contract.get("containers", [""]):
            names = re.findall(r"[\w.]+", " ".join(contract.get("layers", [])))
            layers |= {f"{container}.{name}".strip(".") for name in names}
    return [
        module
        for module in package.trees
        if module != package.name and not any(f"{module}.".startswith(f"{layer}.") for layer in layers)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description="How simple the whole is.")
    parser.add_argument("--root", type=Path, default=Path(__file__).parent.parent, help="project to measure")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a figure is above its limit")
    parser.add_argument("--lists", action="store_true", help="show what is behind the figures")
    arguments = parser.parse_args()
    figures, lists = measure(arguments.root)
    above = [name for name, limit in LIMITS.items() if figures[name] > limit]
    print(f"{'':44}{'now':>10}{'at most':>10}")
    for name, figure in figures.items():
        limit = f"{LIMITS[name]:10,}" if name in LIMITS else ""
        print(f"{name:44}{figure:10,}{limit}{'  above' if name in above else ''}")
    for title, lines in lists.items() if arguments.lists else ():
        print(f"\n{title} ({len(lines)})", *lines, sep="\n  ")
    return 1 if arguments.check and above else 0


if __name__ == "__main__":
    raise SystemExit(main())
