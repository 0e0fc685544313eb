"""A small client for any V2 server: `Client` and, for asyncio, `AsyncClient`. Knows no model; it asks the server.

    from doorstep.client import Client

    with Client("http://127.0.0.1:8000") as client:
        embedding = client.infer("minilm", text="A cat sat on the mat.")  # numpy array, shape (1, 384)

What the server refuses is raised as one of `doorstep.errors`, with the server's own text.
"""

from __future__ import annotations

from doorstep.client.aio import AsyncClient
from doorstep.client.connect import TimedOut
from doorstep.client.sync import Client

__all__ = ["AsyncClient", "Client", "TimedOut"]
