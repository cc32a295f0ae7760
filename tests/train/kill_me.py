"""A training process for the kill tests: checkpoints after every step, as fast as it can, or with a slow disk."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    torch.set_num_threads(1)
    from inlay.train import fit
    from tests.train.test_resume import KILLED, killed_settings
    from tests.train.tiny import rows, wearing

    run = Path(sys.argv[1])
    if "slow" in sys.argv:
        fsync = os.fsync

        def slowly(handle):
            time.sleep(0.005)
            fsync(handle)

        os.fsync = slowly
    fit(wearing(**KILLED), "a", rows(30), rows(4, 1), killed_settings(run), run, None, resume=True)
