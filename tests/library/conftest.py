"""Folders of adapters for tests of banks."""

from __future__ import annotations

import shutil

import pytest

import inlay
from tests.evaluate import tiny
from tests.library import folders


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """The folder that `folders.write` fills."""
    folder = tmp_path_factory.mktemp("library")
    folders.write(folder)
    return folder


@pytest.fixture
def folder(root, tmp_path):
    """A copy of `root/adapters` that may be changed."""
    return shutil.copytree(root / "adapters", tmp_path / "adapters")


@pytest.fixture
def host():
    """A bare one."""
    return inlay.attach(tiny.base("llama"))
