"""Recognising a function of another library by its source text, before a faster one takes its place."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable
from typing import Any


@functools.cache
def has_body(function: Callable[..., Any], body: str) -> bool:
    """Whether a function's body is `body`, comments, docstring and layout aside; a wrapper's never is.

    Decorators that return the function itself (transformers mark functions so) do not count as wrappers. A function
    without source text, or with any other statement, is not recognised: its caller then keeps the library's own.
    """
    if hasattr(function, "__wrapped__"):
        return False
    try:
        (node,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    except (OSError, TypeError, SyntaxError, ValueError):
        return False
    if not isinstance(node, ast.FunctionDef):
        return False
    statements = node.body[1:] if ast.get_docstring(node) is not None else node.body
    return [ast.dump(s) for s in statements] == [ast.dump(s) for s in ast.parse(textwrap.dedent(body)).body]
