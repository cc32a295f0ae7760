"""Whether a function is a known one: by what it is written as."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable
from typing import Any


@functools.cache
def says(function: Callable[..., Any], body: str) -> bool:
    """Whether a function's body is this one, comments, docstring and layout aside; a wrapper's never is.

    A decorator that gives the function itself back (transformers mark theirs so) is none.
    """
    if hasattr(function, "__wrapped__"):
        return False
    try:
        (found,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    except (OSError, TypeError, SyntaxError, ValueError):
        return False
    if not isinstance(found, ast.FunctionDef):
        return False
    lines = found.body[1:] if ast.get_docstring(found) is not None else found.body
    return [ast.dump(line) for line in lines] == [ast.dump(line) for line in ast.parse(textwrap.dedent(body)).body]
