# SPDX-License-Identifier: Apache-2.0
"""The mistakes that are put into a module, one at a time: each is a mutant.

They are those that people make: a limit that is off by one, a condition or a step left out, a wrong unit factor, a flag
or an option forgotten, a wrong key. Texts with a blank in them, docstrings, type hints and asserts, which only tell the
type checker a fact, stay as they are.
"""

from __future__ import annotations

import ast
import copy
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

Change = tuple[ast.AST, ast.AST]
"""A node, and the one that takes its place."""

_COMPARED: Final[dict[type, tuple[type[ast.cmpop], ...]]] = {
    ast.Lt: (ast.LtE, ast.GtE), ast.LtE: (ast.Lt, ast.Gt), ast.Gt: (ast.GtE, ast.LtE), ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,), ast.Is: (ast.IsNot,), ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,), ast.NotIn: (ast.In,),
}  # fmt: skip
_COMPUTED: Final[dict[type, type[ast.operator]]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.LShift: ast.RShift, ast.RShift: ast.LShift, ast.BitAnd: ast.BitOr, ast.Pow: ast.Mult,
}  # fmt: skip
_OTHER_NAMES: Final = {"min": "max", "max": "min", "any": "all", "all": "any"}
_UNCALLED: Final = {"cast", "TypeVar", "dataclass", "NewType"}
"""Calls whose arguments are for the type checker, or change nothing that code does."""
_KEPT_KEYWORDS: Final = {"strict", "help", "metavar", "encoding", "stacklevel"}
_HINTS: Final = {"annotation", "returns", "type_params"}
_LONGEST: Final = 160
"""Characters of a mutant's name, so that it fits into a line of a report."""


@dataclass(frozen=True)
class Mutant:
    """One mistake. ``index`` counts those of its module; ``name`` stays the same while its function does."""

    module: str
    index: int
    line: int
    name: str


def _compare(node: ast.Compare) -> Iterator[Change]:
    for at, operator in enumerate(node.ops):
        for other in _COMPARED[type(operator)]:
            yield node, ast.Compare(node.left, [*node.ops[:at], other(), *node.ops[at + 1 :]], node.comparators)


def _constant(node: ast.Constant) -> Iterator[Change]:
    value = node.value
    if isinstance(value, bool):
        yield node, ast.Constant(not value)
    elif isinstance(value, int):
        yield node, ast.Constant(value + 1)
    elif isinstance(value, float):
        yield node, ast.Constant(value * 2 or 1.0)
    elif isinstance(value, str) and 0 < len(value) <= 20 and not any(each.isspace() for each in value):
        yield node, ast.Constant(value + "X")


def _call(node: ast.Call) -> Iterator[Change]:
    for at, keyword in enumerate(node.keywords):
        if keyword.arg and keyword.arg not in _KEPT_KEYWORDS:
            yield node, ast.Call(node.func, node.args, [*node.keywords[:at], *node.keywords[at + 1 :]])
    if isinstance(node.func, ast.Name) and node.func.id in _OTHER_NAMES:
        yield node.func, ast.Name(_OTHER_NAMES[node.func.id], ast.Load())


def _operation(node: ast.BinOp | ast.AugAssign) -> Iterator[Change]:
    if other := _COMPUTED.get(type(node.op)):
        changed = copy.copy(node)
        changed.op = other()
        yield node, changed
    elif isinstance(node, ast.AugAssign):
        yield node, ast.Pass()
    elif isinstance(node.op, ast.BitOr):
        yield node, node.left
        yield node, node.right


def _changes(node: ast.AST) -> Iterator[Change]:
    """Yield the mistakes of one node."""
    match node:
        case ast.Compare():
            yield from _compare(node)
        case ast.Constant():
            yield from _constant(node)
        case ast.Call():
            yield from _call(node)
        case ast.BinOp() | ast.AugAssign():
            yield from _operation(node)
        case ast.BoolOp():
            for at in range(len(node.values)):
                rest = [*node.values[:at], *node.values[at + 1 :]]
                yield node, rest[0] if len(rest) == 1 else ast.BoolOp(node.op, rest)
        case ast.UnaryOp(op=ast.Not() | ast.USub()) if not isinstance(node.operand, ast.Constant):
            yield node, node.operand
        case ast.If() | ast.IfExp():
            yield node.test, ast.Constant(False)
            yield node.test, ast.Constant(True)
        case ast.While() if not isinstance(node.test, ast.Constant):
            yield node.test, ast.Constant(False)
        case ast.comprehension():
            for test in node.ifs:
                yield test, ast.Constant(True)
        case ast.Expr(value=ast.Call()):
            yield node, ast.Pass()
        case ast.Continue():
            yield node, ast.Break()
        case ast.Break():
            yield node, ast.Continue()


def _is_left(node: ast.AST) -> bool:
    """Return whether a node and all below it stay as they are."""
    match node:
        case ast.Assert() | ast.Expr(value=ast.Constant()) | ast.Import() | ast.ImportFrom():
            return True
        case ast.If(test=ast.Name(id="TYPE_CHECKING")) | ast.Subscript(value=ast.Name(id="Literal")):
            return True
        case ast.Call(func=ast.Name(id=name)):
            return name in _UNCALLED
        case ast.Assign(targets=[ast.Name(id="__all__")]):
            return True
    return False


def _walk(node: ast.AST, where: str) -> Iterator[tuple[ast.AST, str]]:
    """Yield each node that may be changed, in the order of the source, with its function's name."""
    yield node, where
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or name in _HINTS or _is_left(child):
                continue
            if (isinstance(node, ast.JoinedStr) and isinstance(child, ast.Constant)) or name == "format_spec":
                continue
            named = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            inner = f"{where}.{child.name}".lstrip(".") if named else where  # type: ignore[attr-defined]
            yield from _walk(child, inner)


def _all(tree: ast.Module) -> Iterator[tuple[ast.AST, ast.AST, str]]:
    for node, where in _walk(tree, ""):
        for target, new in _changes(node):
            yield target, new, where


def mutants(module: str, source: str) -> list[Mutant]:
    """Return the mutants of a module, whose path is that in the repository."""
    found, seen = [], Counter[str]()
    for index, (target, new, where) in enumerate(_all(ast.parse(source))):
        before, after = (" ".join(ast.unparse(each).split()) for each in (target, new))
        name = f"{module} {where or '-'}: {before} => {after}"
        name = name if len(name) <= _LONGEST else f"{name[: _LONGEST - 30]}...{name[-27:]}"
        seen[name] += 1
        name += f" #{seen[name]}" if seen[name] > 1 else ""
        found.append(Mutant(module, index, getattr(target, "lineno", 0), name))
    return found


class _Swap(ast.NodeTransformer):
    def __init__(self, target: ast.AST, new: ast.AST) -> None:
        self._target, self._new = target, new

    def visit(self, node: ast.AST) -> ast.AST:
        """Return the new node for the one that is replaced."""
        return ast.copy_location(self._new, node) if node is self._target else super().generic_visit(node)


def mutated(source: str, index: int) -> ast.Module:
    """Return a module's tree with one mistake in it."""
    tree = ast.parse(source)
    for at, (target, new, *_) in enumerate(_all(tree)):
        if at == index:
            _Swap(target, new).generic_visit(tree)
            return ast.fix_missing_locations(tree)
    raise IndexError(index)
