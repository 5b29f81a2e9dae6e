"""Every test that a promise names is there."""

from __future__ import annotations

import ast
import re

import pytest

from conftest import PROJECT

DOCUMENTS = ("SECURITY.md", "docs/reliability.md")
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_promise_names_tests_that_exist(document):
    named = NAMED.findall((PROJECT / document).read_text("utf-8"))
    assert len(named) > 20
    for file, function in named:
        tree = ast.parse((PROJECT / file).read_text("utf-8"))
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{file}::{function}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_row_of_a_table_of_promises_names_a_test(document):
    rows = [line for line in (PROJECT / document).read_text("utf-8").splitlines() if line.startswith("| ")]
    assert [row for row in rows if "held by" not in row and not NAMED.search(row)] == []


def is_slow(function: ast.FunctionDef, module: ast.Module) -> bool:
    """Whether every case of a test is left to `make test-slow`."""
    of_all = [node.value for node in module.body if isinstance(node, ast.Assign) and "pytestmark" in ast.unparse(node)]
    return "pytest.mark.slow" in map(ast.unparse, [*function.decorator_list, *of_all])


@pytest.mark.parametrize("document", DOCUMENTS)
def test_a_promise_that_only_slow_tests_hold_says_so(document):
    for row in (PROJECT / document).read_text("utf-8").splitlines():
        named = NAMED.findall(row) if row.startswith("| ") else []
        slow = []
        for file, name in named:
            module = ast.parse((PROJECT / file).read_text("utf-8"))
            slow += [is_slow(node, module) for node in module.body if getattr(node, "name", None) == name]
        assert not named or not all(slow) or "`make test-slow`" in row, row


def test_the_seed_and_count_of_fuzzing_are_those_of_the_test():
    from samples.test_image_files import FUZZING_SEED, NUM_MUTATIONS

    text = (PROJECT / "docs/reliability.md").read_text("utf-8")
    assert f"seed {FUZZING_SEED}" in text
    assert f"{NUM_MUTATIONS:,} mutations" in text
