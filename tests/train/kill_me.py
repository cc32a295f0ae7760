"""A training process for the kill tests: checkpoints after every step, fast or with a slow disk, or none at all."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace
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
    s = killed_settings(run)
    if "never" in sys.argv:
        s = replace(s, run=replace(s.run, save_every=0))
    fit(wearing(**KILLED), "a", rows(30), rows(4, 1), s, run, None, resume=True)
