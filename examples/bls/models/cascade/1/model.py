"""A model that calls others (BLS): the costly one only where the cheap one is not sure.

doorstep infer cascade text="Das ist neu"
"""

import numpy as np
import triton_python_backend_utils as pb_utils


def ask(model, outputs, text, request):
    call = pb_utils.InferenceRequest(
        model_name=model, requested_output_names=outputs, inputs=[text], trace=request.trace()
    )
    response = call.exec()
    if response.has_error():
        raise pb_utils.TritonModelException(response.error().message())
    return [pb_utils.get_output_tensor_by_name(response, name).as_numpy() for name in outputs]


class TritonPythonModel:
    def execute(self, requests):
        responses = []
        for request in requests:
            text = pb_utils.get_input_tensor_by_name(request, "text")
            asked = "cheap"
            language, sure = ask("cheap", ["language", "sure"], text, request)
            if sure[0] < 0.5:
                asked = "costly"
                [language] = ask("costly", ["output"], text, request)
            tensors = [
                pb_utils.Tensor("language", language),
                pb_utils.Tensor("asked", np.array([asked.encode()], dtype=np.object_)),
            ]
            responses.append(pb_utils.InferenceResponse(tensors))
        return responses
