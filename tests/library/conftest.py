"""Folders of adapters for tests of banks."""

from __future__ import annotations

import pytest

from tests.library import folders


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """The folder that `folders.write` fills."""
    folder = tmp_path_factory.mktemp("library")
    folders.write(folder)
    return folder
