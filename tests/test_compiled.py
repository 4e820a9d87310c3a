"""What holds for the modules that mypyc compiles (docs/decisions/0005-compiled.md)."""

from __future__ import annotations

import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
hatch_build = importlib.import_module("hatch_build")
MODULES = [ROOT / "proxy" / name for name in hatch_build.COMPILED]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_the_tests_run_what_they_say(path: Path) -> None:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    module = importlib.import_module(name)
    assert str(module.__file__).endswith(".so" if os.environ.get("EXPECT_COMPILED") else ".py")


def test_the_version_says_which_one_runs() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "proxy", "--version"], capture_output=True, text=True, check=True
    ).stdout
    assert ("(compiled, " if os.environ.get("EXPECT_COMPILED") else "(pure Python, ") in shown


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_no_call_stands_in_the_bounds_of_a_slice(path: Path) -> None:
    """mypyc may evaluate them twice."""
    calls = [
        f"{path.name}:{node.lineno}"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Slice)
        and any(isinstance(inner, ast.Call) and not _pure(inner) for inner in ast.walk(node))
    ]
    assert calls == []


def _pure(call: ast.Call) -> bool:
    return isinstance(call.func, ast.Name) and call.func.id in ("len", "max", "min")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_nothing_is_awaited_while_an_exception_is_handled(path: Path) -> None:
    """mypyc's coroutines have no exception state of their own: the thread would go on handling it in every other task."""
    handlers: list[ast.stmt] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Try):
            handlers += node.finalbody
        elif isinstance(node, ast.ExceptHandler):
            handlers += node.body
    awaits = (ast.Await, ast.AsyncWith, ast.AsyncFor, ast.Yield, ast.YieldFrom)
    assert [
        f"{path.name}:{inner.lineno}" for one in handlers for inner in ast.walk(one) if isinstance(inner, awaits)
    ] == []


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_no_two_exceptions_share_a_name(path: Path) -> None:
    """mypyc takes the second for one of the first's type."""
    for function in ast.walk(ast.parse(path.read_text())):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            types: dict[str, set[str]] = {}
            for handler in ast.walk(function):
                if isinstance(handler, ast.ExceptHandler) and handler.name and handler.type:
                    types.setdefault(handler.name, set()).add(ast.dump(handler.type))
            assert [name for name, found in types.items() if len(found) > 1] == [], f"{path.name}: {function.name}"
