"""Two sequences at once: python call.py [localhost:8000]"""

import sys

import numpy as np
import tritonclient.http as httpclient

url = sys.argv[1] if len(sys.argv) > 1 else "localhost:8000"
sequences = {"morning": [1, 2, 6], "evening": [10, 20, 60]}  # ids may be texts, or numbers from 1

with httpclient.InferenceServerClient(url) as client:
    for turn in range(3):
        for name, values in sequences.items():
            x = httpclient.InferInput("X", [1, 1], "FP32")
            x.set_data_from_numpy(np.array([[values[turn]]], np.float32))
            answer = client.infer("average", [x], sequence_id=name, sequence_start=turn == 0, sequence_end=turn == 2)
            print(f"{name}: {values[turn]} → mean {answer.as_numpy('MEAN')[0, 0]}")
