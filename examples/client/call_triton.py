"""The same server with NVIDIA's client, over HTTP and gRPC. Serve ../python-model/models first.

pip install 'tritonclient[http,grpc]'
python call_triton.py [127.0.0.1:8000 [127.0.0.1:8001]]
"""

import sys

import numpy as np
import tritonclient.grpc as grpcclient
import tritonclient.http as httpclient

addresses = (sys.argv[1:] + ["127.0.0.1:8000", "127.0.0.1:8001"][len(sys.argv) - 1 :])[:2]

for module, address in zip((httpclient, grpcclient), addresses, strict=True):
    with module.InferenceServerClient(address) as client:
        text = module.InferInput("text", [2], "BYTES")
        text.set_data_from_numpy(np.array(["hello", "world"], dtype=object))
        print(module.__name__, client.infer("shout", [text]).as_numpy("output"))
