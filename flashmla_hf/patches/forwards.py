"""What a module's forward takes and does, read from its class: parameters, names, and how it uses the logits.

A patch asks before it replaces anything, so that a model which it does not fit is refused by :func:`flashmla_hf.patch` and not
in its first step.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn


def parameters_of(module: nn.Module) -> Mapping[str, inspect.Parameter]:
    """The parameters of the forward of ``module``'s class by name, without self, under its decorators."""
    parameters = dict(inspect.signature(inspect.unwrap(type(module).forward)).parameters)
    parameters.pop("self", None)
    return parameters


def names_in(function: Callable[..., Any]) -> tuple[str, ...]:
    """The globals and attributes that ``function`` names, under its decorators; empty if it is not written in Python."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return code.co_names if code is not None else ()


def that_names(model_class: type, name: str) -> Callable[..., Any] | None:
    """The forward of ``model_class`` that names ``name``: its own, or one that it calls by ``super()``."""
    for owner in model_class.__mro__:
        if "forward" in vars(owner):
            names = names_in(vars(owner)["forward"])
            if name in names:
                return inspect.unwrap(vars(owner)["forward"])
            if "super" not in names:
                return None
    return None


def attribute_of_result(forward: Callable[..., Any], module: str, allowed: set[str]) -> str | None:
    """The first attribute or index that ``forward`` reads of the result of ``self.<module>(...)``, but for ``allowed``.

    It follows the names to which the result is assigned. ``None`` if there is no such use, or no source to read.
    """
    tree = _tree(forward)
    if tree is None:
        return None
    results = {
        target.id
        for statement in ast.walk(tree)
        if isinstance(statement, ast.Assign) and any(_is_call(part, module) for part in ast.walk(statement.value))
        for target in statement.targets
        if isinstance(target, ast.Name)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Subscript) and isinstance(node.value, ast.Name):
            name = node.value.id
            if name in results and not (isinstance(node, ast.Attribute) and node.attr in allowed):
                return ast.unparse(node)
    return None


def numbers_passed(forward: Callable[..., Any], module: str) -> set[int]:
    """The numbers of arguments with which ``forward`` calls ``self.<module>``; empty if it has no source to read."""
    tree = _tree(forward)
    calls = [node for node in ast.walk(tree) if _is_call(node, module)] if tree is not None else []
    return {len(c.args) + len(c.keywords) for c in calls if isinstance(c, ast.Call)}


def other_use(forward: Callable[..., Any], source: str, target: str) -> str | None:
    """The first expression by which ``forward`` uses a result of ``….source(...)`` otherwise than as an argument of a call of
    ``target`` (a name or an attribute), or by reading its shape.

    It follows the names that the results are assigned to, from there to the end of the function. ``None`` if there is no other
    use. Without source to read, or without such an assignment, the answer is what is missing.
    """
    tree = _tree(forward)
    assigned = [
        statement
        for statement in ast.walk(tree or ast.Module([], []))
        if isinstance(statement, ast.Assign) and _name_called(statement.value) == source
    ]
    if not assigned:
        return f"no results of {source}"
    allowed: set[int] = set()
    for node in ast.walk(tree):  # type: ignore[arg-type]
        if isinstance(node, ast.Call) and _name_called(node) == target:
            allowed.update(id(argument) for argument in (*node.args, *(k.value for k in node.keywords)))
        if isinstance(node, ast.Attribute) and node.attr == "shape":
            allowed.add(id(node.value))
    for statement in assigned:
        names = {part.id for goal in statement.targets for part in ast.walk(goal) if isinstance(part, ast.Name)}
        for node in ast.walk(tree):  # type: ignore[arg-type]
            is_later = isinstance(node, ast.Name) and node.lineno > (statement.end_lineno or statement.lineno)
            if is_later and node.id in names and isinstance(node.ctx, ast.Load) and id(node) not in allowed:
                return f"{node.id} in line {node.lineno} of its forward"
    return None


def _name_called(node: ast.AST) -> str | None:
    """The name of the function that ``node``, a call, calls: ``f`` of ``f(...)`` and of ``x.f(...)``."""
    if not isinstance(node, ast.Call):
        return None
    if isinstance(node.func, ast.Attribute):
        return node.func.attr
    return node.func.id if isinstance(node.func, ast.Name) else None


def _tree(function: Callable[..., Any]) -> ast.Module | None:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return None


def _is_call(node: ast.AST, module: str) -> bool:
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
        return False
    return node.func.attr == module and isinstance(node.func.value, ast.Name) and node.func.value.id == "self"
