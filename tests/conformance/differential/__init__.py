"""The same requests to Doorstep and to a real Triton; every difference is mended or listed with its reason.

`repository.py` writes the models, `http_cases.py` and `grpc_cases.py` the requests, `wire.py` sends them, `compare.py` says what
differs, `differences.toml` which differences are meant and why.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
if str(ROOT) not in sys.path:  # for benchmarks.peers, where the real Triton is started
    sys.path.insert(0, str(ROOT))
