"""One base with adapters and one server for most tests."""

from __future__ import annotations

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("openai")

from tests.serve import tiny_server  # noqa: E402


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """The folder that `tiny_server.write` fills."""
    folder = tmp_path_factory.mktemp("served")
    tiny_server.write(folder)
    return folder


@pytest.fixture(scope="module")
def served(root):
    """A server on a thread."""
    with tiny_server.inside(root) as s:
        yield s


@pytest.fixture(scope="session")
def reference(root):
    """A host that wears the same adapters."""
    return tiny_server.host(root)
