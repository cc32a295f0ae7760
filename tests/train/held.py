"""`inlay train`, in a process that says at its end which share of the base's numbers it held."""

from __future__ import annotations

import os
import sys

from inlay.cli import main
from inlay.core.sharded import local
from inlay.train import fitting

finish = fitting._finish


def told(loop, *rest):
    base = [p for n, p in loop.host.model.named_parameters() if "inlay" not in n]
    here, all_of_it = sum(local(p).numel() for p in base), sum(p.numel() for p in base)
    os.write(1, f"held {here / all_of_it}\n".encode())
    return finish(loop, *rest)


fitting._finish = told

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
