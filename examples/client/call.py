"""Calls with Doorstep's own client. Serve ../python-model/models first.

python call.py [http://127.0.0.1:8000]
"""

import sys

import numpy as np

from doorstep.client import Client
from doorstep.errors import DoorstepError

url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"

with Client(url, timeout=10) as client:
    print("models:", ", ".join(entry["name"] for entry in client.models()))

    # One output: an array. Text goes in as str and comes out as bytes, because a model may answer with any bytes.
    print("shout:", client.infer("shout", text=["hello", "world"]))

    # Several outputs: a dict. Lists and arrays are made what the model takes; the batch dimension is added.
    found = client.infer("statistics", values=np.array([1.0, 2.0, 6.0]))
    print(f"statistics: mean {found['mean'].item()}, largest {found['largest'].item()}")

    # Errors carry the server's text.
    try:
        client.infer("nobody", text="anyone?")
    except DoorstepError as error:
        print("error:", error)
