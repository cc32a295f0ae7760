"""SmolLM2-135M, if its package is installed; every test here is skipped without it."""

from __future__ import annotations

import pytest
import torch

import inlay
from inlay.models import real

NAME = "smollm2-135m"


@pytest.fixture(autouse=True)
def installed():
    """Skip where the package is missing."""
    if not real.installed(NAME):
        pytest.skip(f"{NAME} is not installed; run: {real.CATALOGUE[NAME].install}")


@pytest.fixture(scope="session")
def loaded():
    """(model, tokenizer), once a session; tests must leave the model as it was."""
    if not real.installed(NAME):
        pytest.skip(f"{NAME} is not installed")
    return inlay.load_base(NAME, device="cpu")


@pytest.fixture
def host(loaded):
    """A host on it, gone after the test."""
    host = inlay.attach(loaded[0])
    yield host
    host.detach()


@pytest.fixture
def inputs(loaded):
    """Token ids of a short text."""
    return loaded[1]("The capital of France is", return_tensors="pt")


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits
