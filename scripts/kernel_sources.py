"""What a Triton kernel is written of: the functions and constants that it reaches, comments and docstrings aside."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]

Name = tuple[str, str]  # of a module, and in it


class _Module(NamedTuple):
    defined: dict[str, list[ast.stmt]]  # the statements that give a name its value
    imported: dict[str, Name]


def written(names: Iterable[Name], root: Path = ROOT) -> dict[Name, str]:
    """The source of ``names`` and of everything in kernels/ and scripts/ that they reach, however far away."""
    found: dict[Name, str] = {}
    waiting = set(names)
    while waiting:
        name = waiting.pop()
        if name not in found and (module := read(name[0], root)):
            trees = module.defined.get(name[1], [])
            found[name] = "\n".join(map(ast.unparse, trees))
            waiting.update(*(_reached(tree, name[0], module) for tree in trees), _imported(name[1], module))
    return {name: source for name, source in found.items() if source}


def _reached(tree: ast.stmt, here: str, module: _Module) -> Iterable[Name]:
    own = _own_names(tree) if isinstance(tree, ast.FunctionDef) else set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id not in own:
            yield here, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            for package, name in _imported(node.value.id, module):
                yield f"{package}.{name}", node.attr


def _own_names(function: ast.FunctionDef) -> set[str]:
    """Its parameters, and what it assigns."""
    nodes = list(ast.walk(function))
    stored = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    return stored | {node.arg for node in nodes if isinstance(node, ast.arg)}


def _imported(name: str, module: _Module) -> Iterable[Name]:
    return (module.imported[name],) if name in module.imported else ()


@functools.cache
def read(name: str, root: Path) -> _Module | None:
    """None of a module that is in neither folder."""
    folder = "kernels" if name.startswith("nest_fast.kernels.") else "scripts"
    path = root / folder / f"{name.rpartition('.')[2]}.py"
    if not path.is_file():
        return None
    module = _Module({}, {})
    for statement in _without_docstrings(ast.parse(path.read_text())).body:
        if isinstance(statement, ast.ImportFrom):
            for one in statement.names:
                module.imported[one.asname or one.name] = statement.module or "", one.name
        for defined in _defined(statement):
            module.defined.setdefault(defined, []).append(statement)
    return module


def _defined(statement: ast.stmt) -> set[str]:
    if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
        return {statement.name}
    targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
    return {node.id for target in targets if target for node in ast.walk(target) if isinstance(node, ast.Name)}


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [  # type: ignore[attr-defined]
                line for line in body if not (isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant))
            ]
    return tree
