"""AdapterHub's side runs in an environment of its own, on the same modules as everything else here."""

import os
import subprocess

import pytest

from benchmarks import adapterhub
from benchmarks.train import agree

pytestmark = pytest.mark.skipif(not adapterhub.PYTHON.exists(), reason="needs `make bench-peers`")


def test_both_series_adapters_compute_the_same_losses(tmp_path):
    ours, peer = adapterhub.sides("tiny", "math", 16, tmp_path, 1)
    try:
        assert {"adapters", "transformers", "torch"} == peer.versions.keys()
        agree(ours, peer, 2, 1e-4)
    finally:
        peer.close()
    assert peer.child.returncode == 0


def test_the_environment_has_no_inlay_of_its_own():
    """It is given this checkout's; another version must not be found first."""
    alone = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    told = subprocess.run([adapterhub.PYTHON, "-c", "import inlay"], env=alone, cwd="/", capture_output=True, text=True)
    assert "No module named 'inlay'" in told.stderr
