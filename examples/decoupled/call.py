"""Reads the words as they come, over a gRPC stream: python call.py [localhost:8001]"""

import sys
from queue import Queue

import numpy as np
import tritonclient.grpc as grpcclient

url = sys.argv[1] if len(sys.argv) > 1 else "localhost:8001"
answers = Queue()
with grpcclient.InferenceServerClient(url) as client:
    client.start_stream(lambda result, error: answers.put((result, error)))
    text = grpcclient.InferInput("TEXT", [1], "BYTES")
    text.set_data_from_numpy(np.array([b"one two three"], dtype=np.object_))
    client.async_stream_infer("words", [text], enable_empty_final_response=True)
    while True:
        result, error = answers.get(timeout=60)
        if error is not None:
            raise error
        if result.get_response().parameters["triton_final_response"].bool_param:
            break
        print(result.as_numpy("WORD")[0].decode(), flush=True)
