"""The same requests to Doorstep and to a real Triton; every difference is mended or listed with its reason.

`repository.py` writes the models, `*_cases.py` are the requests, `wire.py` sends them, `runner.py` asks a server all of
them, `differences.toml` says which differences are meant and why, `compare.py` finds those it does not say.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
if str(ROOT) not in sys.path:  # for benchmarks.peers, where the real Triton is started
    sys.path.insert(0, str(ROOT))
