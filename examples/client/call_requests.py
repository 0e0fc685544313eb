"""No client library at all: the V2 protocol is JSON over HTTP. Serve ../python-model/models first.

pip install requests
python call_requests.py [http://127.0.0.1:8000]
"""

import sys

import requests

url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"

body = {"inputs": [{"name": "text", "datatype": "BYTES", "shape": [2], "data": ["hello", "world"]}]}
answer = requests.post(f"{url}/v2/models/shout/infer", json=body, timeout=10)
answer.raise_for_status()
print(answer.json()["outputs"][0]["data"])
