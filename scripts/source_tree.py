"""A package read from its source: its modules, what names stand for, who imports whom, and the settings' walk.

The walk: a reader follows the settings from the training node through the calls. Settings are what a pipeline gives
the node as `params:` in a class of the package, the blocks in their fields, and values of a class that holds nothing
but blocks and plain values. The reader takes a function's calls in the order of the source, arguments before their
call. The first time that a function or class of the package receives settings, as an argument or as the object of a
method, the reader enters it, and comes back at its end. A stay is the time in one file until the next file; a return
is a stay in a file that had one before. Calls are resolved by imports, definitions, annotations and constructed
classes; what cannot be resolved so is not entered, and single values taken out of a block are not followed.
"""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import resolve_name
from pathlib import Path

TRAINING_MODULE, TRAINING_NODE = "pipelines.training.nodes", "train_adapter"
PLAIN = {"str", "int", "float", "bool", "Literal", "Path", "PositiveInt", "NonNegativeInt", "PositiveFloat"}
"""Names in the annotations of plain values."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Definition:
    """A function or class of the package; `owner` is the class of a method."""

    module: str
    node: Function | ast.ClassDef
    owner: Definition | None = None


Classes = Mapping[str, Definition | None]
"""Of names in a function, the classes of their values, where those are of the package."""


class Package:
    """The modules of a package by name, and what the names in them stand for."""

    def __init__(self, root: Path) -> None:
        tools = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
        self.name: str = tools["importlinter"]["root_package"]
        self.contracts: list[dict[str, list[str]]] = tools["importlinter"]["contracts"]
        self.texts: dict[str, str] = {}
        self.folders: dict[str, str] = {}
        for path in sorted((root / "src" / self.name).rglob("*.py")):
            *folder, file = path.relative_to(root / "src").with_suffix("").parts
            module = ".".join(folder if file == "__init__" else [*folder, file])
            self.texts[module], self.folders[module] = path.read_text(encoding="utf-8"), ".".join(folder)
        self.trees = {module: ast.parse(text) for module, text in self.texts.items()}
        self.lines = {module: len(text.splitlines()) for module, text in self.texts.items()}
        self.files = sorted(self.trees.keys() - set(self.folders.values()))
        """Modules that are no package's `__init__`."""
        self.nodes = [(module, node) for module, tree in self.trees.items() for node in ast.walk(tree)]
        self.functions = [(module, node) for module, node in self.nodes if isinstance(node, Function)]
        self.classes = {Definition(module, node) for module, node in self.nodes if isinstance(node, ast.ClassDef)}

    def _imported(self, module: str, node: ast.AST) -> Iterator[tuple[str, str, str]]:
        """Of an import: the name that it gives, the module, and what is taken from it, if anything."""
        if isinstance(node, ast.Import | ast.ImportFrom):
            level, name = (node.level, node.module) if isinstance(node, ast.ImportFrom) else (0, None)
            source = resolve_name("." * level + (name or ""), self.folders[module]) if level or name else ""
            for alias in node.names:
                yield alias.asname or alias.name, source or alias.name, alias.name if source else ""

    def imports(self, *, type_checking: bool) -> dict[str, set[str]]:
        """The modules of the package that each module imports: when it runs, or under TYPE_CHECKING."""
        graph: dict[str, set[str]] = {module: set() for module in self.trees}
        branches = [node for _, node in self.nodes if isinstance(node, ast.If)]
        guards = [branch for branch in branches if ast.unparse(branch.test).endswith("TYPE_CHECKING")]
        guarded = {inner for guard in guards for part in guard.body for inner in ast.walk(part)}
        for module, node in self.nodes:
            for _, source, name in self._imported(module, node) if (node in guarded) is type_checking else ():
                target = f"{source}.{name}" if f"{source}.{name}" in self.trees else source
                graph[module] |= {target} & (self.trees.keys() - {module})
        return graph

    @cached_property
    def _names(self) -> dict[str, dict[str, Definition | tuple[str, str]]]:
        names: dict[str, dict[str, Definition | tuple[str, str]]] = {module: {} for module in self.trees}
        for module, node in self.nodes:
            names[module] |= {alias: (source, name) for alias, source, name in self._imported(module, node)}
        for module, tree in self.trees.items():
            own = [node for node in tree.body if isinstance(node, Function | ast.ClassDef)]
            names[module] |= {node.name: Definition(module, node) for node in own}
        return names

    def find(self, module: str, name: str) -> Definition | str | None:
        """What a name in a module stands for: a definition, a module of the package, or nothing of the package."""
        found = self._names.get(module, {}).get(name)
        if not isinstance(found, tuple):
            return found
        target = ".".join(filter(None, found))
        return target if target in self.trees else self.find(*found)

    def resolve(self, module: str, node: ast.AST | None) -> Definition | str | None:
        """The same for an expression."""
        if isinstance(node, ast.Attribute):
            base = self.resolve(module, node.value)
            if isinstance(base, str):
                return f"{base}.{node.attr}" if f"{base}.{node.attr}" in self.trees else self.find(base, node.attr)
            return self.method(base, node.attr) if base else None
        return self.find(module, node.id) if isinstance(node, ast.Name) else None

    def class_of(self, module: str, annotation: ast.AST | None) -> Definition | None:
        """The class of the package that an annotation names, alone or in a union."""
        if isinstance(annotation, ast.BinOp):
            return self.class_of(module, annotation.left) or self.class_of(module, annotation.right)
        found = self.resolve(module, annotation)
        return found if isinstance(found, Definition) and isinstance(found.node, ast.ClassDef) else None

    def method(self, kind: Definition, name: str) -> Definition | None:
        own = (node for node in kind.node.body if isinstance(node, Function) and node.name == name)
        inherited = (self.method(base, name) for base in self._bases(kind))
        return next((Definition(kind.module, node, kind) for node in own), None) or next(filter(None, inherited), None)

    def _bases(self, kind: Definition) -> list[Definition]:
        bases = kind.node.bases if isinstance(kind.node, ast.ClassDef) else []
        return [found for base in bases if (found := self.class_of(kind.module, base))]

    def fields(self, kind: Definition) -> dict[str, tuple[str, ast.expr]]:
        """Annotated fields, each with the module that its annotation stands in."""
        found = {name: field for base in reversed(self._bases(kind)) for name, field in self.fields(base).items()}
        nodes = [node for node in kind.node.body if isinstance(node, ast.AnnAssign)]
        return found | {ast.unparse(node.target): (kind.module, node.annotation) for node in nodes}

    def settings_of(self, node: Definition) -> set[Definition]:
        """The classes of those parameters of a node that a pipeline fills from `params:`.

        Raises:
            SystemExit: if no pipeline has the node, or its inputs are not literals.
        """
        for call in [call for module, call in self.nodes if ".pipelines." in module and isinstance(call, ast.Call)]:
            if [ast.unparse(argument) for argument in call.args[:1]] == [node.node.name]:
                inputs = [word.value for word in call.keywords if word.arg == "inputs"] or call.args[1:2]
                try:
                    given = ast.literal_eval(inputs[0])
                except (IndexError, ValueError):
                    raise SystemExit(f"{node.node.name}: expected inputs that are literals in its pipeline.") from None
                pairs = given.items() if isinstance(given, dict) else zip(self.parameters(node), given, strict=True)
                filled = {parameter for parameter, name in pairs if name.startswith("params:")}
                return {kind for name, kind in self.parameters(node).items() if kind and name in filled}
        raise SystemExit(f"No pipeline has a node of {node.node.name}.")

    def parameters(self, called: Definition) -> Classes:
        """Of a function its parameters, of a class its fields."""
        if isinstance(called.node, ast.ClassDef):
            return {name: self.class_of(*field) for name, field in self.fields(called).items()}
        return {item.arg: self.class_of(called.module, item.annotation) for item in parameters(called.node)}


class Walk:
    """The way of a reader who follows the settings: `stays` by file, and `calls`, indented by depth."""

    def __init__(self, package: Package) -> None:
        self.package = package
        self.stays: list[str] = []
        self.calls: list[str] = []
        self._entered: set[ast.AST] = set()
        start = package.find(f"{package.name}.{TRAINING_MODULE}", TRAINING_NODE)
        if not isinstance(start, Definition):
            raise SystemExit(f"{TRAINING_NODE} not found in {package.name}.{TRAINING_MODULE}.")
        self._settings = self._with_parts_and_bundles(package.settings_of(start))
        self._enter(start, 0)

    def _with_parts_and_bundles(self, found: set[Definition]) -> set[Definition]:
        while parts := {part for kind in found for part in self.package.parameters(kind).values() if part} - found:
            found |= parts
        while bundles := {kind for kind in self.package.classes - found if self._is_bundle(kind, found)}:
            found |= bundles
        return found

    def _is_bundle(self, kind: Definition, blocks: set[Definition]) -> bool:
        fields = self.package.fields(kind).values()
        others = [annotation for where, annotation in fields if self.package.class_of(where, annotation) not in blocks]
        names = {node.id for annotation in others for node in ast.walk(annotation) if isinstance(node, ast.Name)}
        return len(others) < len(fields) and names <= PLAIN

    def _enter(self, function: Definition, depth: int) -> None:
        module, node = function.module, function.node
        self._entered.add(node)
        self._stand_in(module)
        self.calls.append(f"{'  ' * depth}{module}: {node.name}")
        if isinstance(node, ast.ClassDef):
            return
        known: dict[str, Definition | None] = {"self": function.owner, **self.package.parameters(function)}
        for inner in _in_order(node.body):
            if isinstance(inner, ast.Assign):
                name = ast.unparse(inner.targets[0])
                known[name] = self._class(module, inner.value, known) or known.get(name)
            elif isinstance(inner, ast.Call):
                for called in (self._to_enter(module, inner, known), self._handed_over(module, inner)):
                    if called is not None:
                        self._enter(called, depth + 1)
                        self._stand_in(module)

    def _stand_in(self, module: str) -> None:
        if self.stays[-1:] != [module]:
            self.stays.append(module)

    def _called(self, module: str, call: ast.Call, known: Classes) -> Definition | None:
        found = self.package.resolve(module, call.func)
        if isinstance(call.func, ast.Attribute) and (kind := self._class(module, call.func.value, known)):
            found = self.package.method(kind, call.func.attr)
        if isinstance(found, Definition) and isinstance(found.node, ast.ClassDef):
            return self.package.method(found, "__init__") or found
        return found if isinstance(found, Definition) else None

    def _to_enter(self, module: str, call: ast.Call, known: Classes) -> Definition | None:
        """What is called, if it is new and its object or an argument, by annotation or its own class, is settings."""
        called = self._called(module, call, known)
        if called is None or called.node in self._entered:
            return None
        receiver = self._class(module, call.func.value, known) if isinstance(call.func, ast.Attribute) else None
        declared = self.package.parameters(called)
        given: dict[str, ast.expr] = dict(zip(declared, call.args, strict=False))
        given |= {word.arg: word.value for word in call.keywords if word.arg}
        names = declared if any(isinstance(argument, ast.Starred) for argument in call.args) else given
        classes = {declared.get(name) or self._class(module, given.get(name), known) for name in names}
        return None if self._settings.isdisjoint({receiver, *classes}) else called

    def _handed_over(self, module: str, call: ast.Call) -> Definition | None:
        """A function that takes settings, given to a call before its own arguments, as in `on_ranks(train, …)`."""
        found = self.package.resolve(module, call.args[0]) if len(call.args) > 1 else None
        if not isinstance(found, Definition) or isinstance(found.node, ast.ClassDef) or found.node in self._entered:
            return None
        return None if self._settings.isdisjoint(self.package.parameters(found).values()) else found

    def _class(self, module: str, node: ast.AST | None, known: Classes) -> Definition | None:
        """The class of an expression's value, where it is of the package and can be seen."""
        if isinstance(node, ast.Name):
            return known.get(node.id)
        found = self._called(module, node, known) if isinstance(node, ast.Call) else None
        if isinstance(node, ast.Attribute) and (base := self._class(module, node.value, known)):
            if field := self.package.fields(base).get(node.attr):
                return self.package.class_of(*field)
            found = self.package.method(base, node.attr)
        if found is None or isinstance(found.node, ast.ClassDef):
            return found
        returns = found.node.returns
        is_own = found.node.name == "__init__" or (returns and ast.unparse(returns) == "Self")
        return found.owner if is_own else self.package.class_of(found.module, returns)


def parameters(function: Function) -> list[ast.arg]:
    """All but `self` and `cls`."""
    given = function.args
    everything = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
    return [item for item in everything if item and item.arg not in ("self", "cls")]


def _in_order(nodes: Sequence[ast.AST]) -> Iterator[ast.AST]:
    """All nodes below these in the order of the source, but arguments before their call."""
    for node in nodes:
        yield from _in_order(list(ast.iter_child_nodes(node)))
        yield node
