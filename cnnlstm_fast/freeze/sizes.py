"""Sizes of a frozen program's inputs: which it holds for, and numbers that follow from them.

Expressions are text in Python's syntax, as a file keeps them. Only arithmetic and comparisons are taken.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

_OPERATORS = (
    ast.Add, ast.Sub, ast.Mult, ast.FloorDiv, ast.Mod, ast.Pow, ast.USub, ast.UAdd, ast.Not, ast.And, ast.Or,
    ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE,
)  # fmt: skip
_PARTS = (ast.Expression, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.Load)
_FUNCTIONS: dict[str, Callable] = {"max": max, "min": min, "abs": abs}
_MOST_TEXT = 4000


def compiled(text: str, names: Sequence[str]) -> Callable[[dict[str, int]], Any]:
    """A function of the values of ``names``.

    Raises:
        ValueError: the text has anything but whole numbers, ``names``, arithmetic, comparisons, ``min`` and
        ``max``.
    """
    if len(text) > _MOST_TEXT:
        raise ValueError("an expression of sizes is too long")
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"{text!r} is not an expression of sizes") from error
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            known = node.id in (_FUNCTIONS if id(node) in called else names)
        elif isinstance(node, ast.Constant):
            known = type(node.value) in (int, bool)
        elif isinstance(node, ast.Call):
            known = isinstance(node.func, ast.Name) and not node.keywords
        else:
            known = isinstance(node, (*_PARTS, *_OPERATORS))
        if not known:
            raise ValueError(f"{text!r} is not an expression of sizes")
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
            if not (isinstance(node.right, ast.Constant) and node.right.value in range(9)):
                raise ValueError(f"{text!r} is not an expression of sizes")
    code = compile(tree, "<sizes>", "eval")
    return lambda values: eval(code, {"__builtins__": {}, **_FUNCTIONS}, values)  # checked above


class Sizes(NamedTuple):
    """What must hold for the sizes of the inputs.

    Attributes:
        shapes: for each input its sizes: numbers, or expressions of names.
        guards: what else must hold; the program was captured under these.
        about_one: what export takes for granted of names, and sizes of 0 and 1 break; the program may hold
            all the same.
    """

    shapes: list[list[int | str]]
    guards: list[str]
    about_one: list[str]

    def names(self) -> list[str]:
        """Names of the sizes that are open."""
        found = {size: None for shape in self.shapes for size in shape if isinstance(size, str)}
        return [name for name in found if name.isidentifier()]

    def checker(self) -> Checker:
        return Checker(self)


class Checker:
    """:class:`Sizes`, compiled."""

    def __init__(self, sizes: Sizes):
        self.sizes = sizes
        names = sizes.names()
        self._guards = [compiled(text, names) for text in sizes.guards]
        self._about_one = [(text, compiled(text, names)) for text in sizes.about_one]
        self._derived = {
            text: compiled(text, names)
            for shape in sizes.shapes
            for text in shape
            if isinstance(text, str) and text not in names
        }

    def values(self, shapes: Sequence[Sequence[int]]) -> dict[str, int] | None:
        """The values of all names, or None where the program is not one of such inputs."""
        values: dict[str, int] = {}
        if len(shapes) != len(self.sizes.shapes):
            return None
        later = []
        for expected, shape in zip(self.sizes.shapes, shapes, strict=True):
            if len(expected) != len(shape):
                return None
            for one, size in zip(expected, shape, strict=True):
                if isinstance(one, int):
                    if one != size:
                        return None
                elif one in self._derived:
                    later.append((one, size))
                elif values.setdefault(one, size) != size:
                    return None
        try:
            for text, size in later:
                if self._derived[text](values) != size:
                    return None
            return values if all(guard(values) for guard in self._guards) else None
        except (ArithmeticError, NameError):
            return None

    def broken(self, values: dict[str, int]) -> set[str]:
        """What export takes for granted and these sizes break."""
        return {text for text, holds in self._about_one if not _holds(holds, values)}


def _holds(guard: Callable[[dict[str, int]], Any], values: dict[str, int]) -> bool:
    try:
        return bool(guard(values))
    except ArithmeticError:
        return False
