"""Any number of responses to a request: a text, answered word by word.

curl -sN localhost:8000/v2/models/words/generate_stream -d '{"TEXT": "one two three"}'
"""

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        for request in requests:
            sender = request.get_response_sender()
            text = pb_utils.get_input_tensor_by_name(request, "TEXT").as_numpy()[0].decode()
            for word in text.split():
                if request.is_cancelled():  # the client has left
                    break
                tensor = pb_utils.Tensor("WORD", np.array([word.encode()], dtype=np.object_))
                sender.send(pb_utils.InferenceResponse([tensor]))
            sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
