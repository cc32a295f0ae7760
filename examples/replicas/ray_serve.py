"""Two replicas of one base and its adapters under Ray Serve.

pip install "ray[serve]" "inlay[serve]"
INLAY_MODEL=tiny-llama INLAY_ADAPTERS=runs serve run examples.replicas.ray_serve:app

Ray takes HTTP on port 8000, gives each request to the replica with fewer in flight, and starts another where one died.
Adapters are read from a folder that all replicas see: one that is put there is found by each when it is asked for.
"""

from __future__ import annotations

import os
from typing import Any

from ray import serve

REPLICAS = int(os.environ.get("INLAY_REPLICAS", 2))
MODEL = os.environ.get("INLAY_MODEL", "tiny-llama")
ADAPTERS = tuple(filter(None, os.environ.get("INLAY_ADAPTERS", "").split(":")))
ROWS = 32


def application() -> Any:
    """Called once in each replica's process."""
    from inlay.serve import run
    from inlay.serve.settings import ServeSettings

    inner, _ = run.application(ServeSettings(model=MODEL, adapters=ADAPTERS, rows=ROWS, threads=1))

    async def outer(scope: Any, receive: Any, send: Any) -> None:
        """Says in a header which process answered."""

        async def told(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-replica", str(os.getpid()).encode())]
            await send(message)

        await inner(scope, receive, told)

    return outer


@serve.deployment(
    num_replicas=REPLICAS,
    max_ongoing_requests=4 * ROWS,  # beyond a replica's own rows, so that its batch is never hungry
    graceful_shutdown_timeout_s=30,
    ray_actor_options={"num_cpus": 1},
)
@serve.ingress(application)
class Replica:
    """A batcher and its HTTP routes."""


app = Replica.bind()
