"""The V2 face of a language model: the tensors of Triton's vLLM backend, to a job and back. Knows no engine.

Names, defaults and texts follow vllm_backend's `src/model.py` and `src/utils/request.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
import orjson

from doorstep.backends.llm.job import Delta, Job
from doorstep.errors import InvalidArgument
from doorstep.request import InferenceRequest
from doorstep.types import BY_CONFIG_NAME, BYTES, FP32, UINT32, Tensor, object_array

N = TypeVar("N", int, float)
# name → datatype, dims
INPUTS = {
    "text_input": ("TYPE_STRING", [1], False),
    "stream": ("TYPE_BOOL", [1], True),
    "sampling_parameters": ("TYPE_STRING", [1], True),
    "exclude_input_in_output": ("TYPE_BOOL", [1], True),
    "return_finish_reason": ("TYPE_BOOL", [1], True),
    "return_cumulative_logprob": ("TYPE_BOOL", [1], True),
    "return_logprobs": ("TYPE_BOOL", [1], True),
    "return_num_input_tokens": ("TYPE_BOOL", [1], True),
    "return_num_output_tokens": ("TYPE_BOOL", [1], True),
}
OUTPUTS = {
    "text_output": ("TYPE_STRING", [-1]),
    "finish_reason": ("TYPE_STRING", [-1]),
    "cumulative_logprob": ("TYPE_FP32", [-1]),
    "logprobs": ("TYPE_STRING", [-1]),
    "num_input_tokens": ("TYPE_UINT32", [1]),
    "num_output_tokens": ("TYPE_UINT32", [-1]),
}
EMBED_INPUTS = {"text_input": ("TYPE_STRING", [-1], False)}
EMBED_OUTPUTS = {"embedding": ("TYPE_FP32", [-1, -1])}
RERANK_INPUTS = {"query": ("TYPE_STRING", [1], False), "documents": ("TYPE_STRING", [-1], False)}
RERANK_OUTPUTS = {"scores": ("TYPE_FP32", [-1])}

_TASKS = {
    "generate": (INPUTS, OUTPUTS),
    "embed": (EMBED_INPUTS, EMBED_OUTPUTS),
    "rerank": (RERANK_INPUTS, RERANK_OUTPUTS),
}
DEFAULT_MAX_TOKENS = 16  # vLLM's
# What sampling parameters may say, and in which range: engines are native code that was written to trust its caller.
# vLLM has more of them, which mean nothing to other engines.
_INTEGERS = {
    "max_tokens": (0, 10_000_000),
    "top_k": (-1, 1_000_000),
    "seed": (-1, 2**53),
    "logprobs": (0, 20),
    "min_tokens": (0, 10_000_000),
}
_NUMBERS = {
    "temperature": (0, 100),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
    "repetition_penalty": (0.01, 10),
}
_MOST_STOPS = 16
_LONGEST_STOP = 256
_FLAGS = ("ignore_eos",)
PASSED_OVER = frozenset(
    ("n", "best_of", "stream", "skip_special_tokens", "include_stop_str_in_output", "detokenize", "priority")
)


def add_tensors(proto: Any, task: str) -> None:
    """Adds to a config what it lacks of the inputs and outputs of `task`."""
    inputs, outputs = _TASKS[task]
    there = {tensor.name for tensor in proto.input}
    for name, (datatype, dims, optional) in inputs.items():
        if name not in there:
            proto.input.add(name=name, data_type=BY_CONFIG_NAME[datatype].config_number, dims=dims, optional=optional)
    there = {tensor.name for tensor in proto.output}
    for name, (datatype, dims) in outputs.items():
        if name not in there:
            proto.output.add(name=name, data_type=BY_CONFIG_NAME[datatype].config_number, dims=dims)


class Generation:
    """One V2 request to generate: its job, and the responses its deltas become."""

    def __init__(self, request: InferenceRequest) -> None:
        inputs = request.inputs
        self.stream = _flag(inputs, "stream")
        exclude = inputs.get("exclude_input_in_output")
        self._prepends = not self.stream if exclude is None else not bool(exclude.array.ravel()[0])
        if self._prepends and self.stream:
            raise InvalidArgument(
                "Error generating stream: When streaming, `exclude_input_in_output` = False is not allowed."
            )
        self._prompt = _text(inputs["text_input"])
        body: dict[str, Any] = {"prompt": self._prompt, "max_tokens": DEFAULT_MAX_TOKENS, **sampling_of(request)}
        self.adapter = str(body.pop("lora_name", ""))
        self._wants = {name: _flag(inputs, f"return_{name}") for name in list(OUTPUTS)[1:]}
        if self._wants["logprobs"] or self._wants["cumulative_logprob"]:
            body.setdefault("logprobs", 1)
        self._body = body
        self._texts: list[str] = []
        self._logprobs: list[dict[str, Any]] = []
        self._cumulative_logprob = 0.0
        self._input_tokens = 0
        self._requested = request.requested_outputs

    def job(self) -> Job:
        return Job("complete", self._body, self.adapter)

    def response(self, delta: Delta) -> list[Tensor] | None:
        """The outputs of a response; None: nothing to say yet."""
        if delta.usage is not None:
            self._input_tokens = delta.usage.prompt
        self._logprobs += delta.logprobs or []
        if self.stream:
            if not delta.text and not delta.finish:
                return None
            logprobs, self._logprobs = self._logprobs, []
            return self._outputs(delta.text, delta, logprobs, delta.tokens)
        self._texts.append(delta.text)
        if not delta.finish:
            return None
        text = "".join(self._texts)
        completion = delta.usage.completion if delta.usage is not None else 0
        return self._outputs(self._prompt + text if self._prepends else text, delta, self._logprobs, completion)

    def _outputs(self, text: str, delta: Delta, logprobs: list[dict[str, Any]], tokens: int) -> list[Tensor]:
        wants = self._wants
        outputs = [_strings("text_output", text.encode())]
        if wants["finish_reason"]:
            outputs.append(_strings("finish_reason", (delta.finish or "None").encode()))
        if wants["cumulative_logprob"]:
            self._cumulative_logprob += math.fsum(entry["logprob"] for entry in logprobs)
            outputs.append(Tensor("cumulative_logprob", FP32, np.array([self._cumulative_logprob], np.float32)))
        if wants["logprobs"]:
            outputs.append(_strings("logprobs", orjson.dumps([_as_vllm(entry) for entry in logprobs])))
        if wants["num_input_tokens"]:
            outputs.append(Tensor("num_input_tokens", UINT32, np.array([self._input_tokens], np.uint32)))
        if wants["num_output_tokens"]:
            outputs.append(Tensor("num_output_tokens", UINT32, np.array([tokens], np.uint32)))
        if self._requested:
            outputs = [tensor for tensor in outputs if tensor.name in self._requested]
        return outputs


def embed_job(request: InferenceRequest) -> Job:
    return Job("embed", {"input": [_decoded(text) for text in request.inputs["text_input"].array.ravel()]})


def rerank_job(request: InferenceRequest) -> Job:
    documents = [_decoded(text) for text in request.inputs["documents"].array.ravel()]
    return Job("rerank", {"query": _text(request.inputs["query"]), "documents": documents})


def value_outputs(operation: str, delta: Delta) -> list[Tensor]:
    name = "embedding" if operation == "embed" else "scores"
    return [Tensor(name, FP32, np.asarray(delta.value, np.float32))]


def sampling_of(request: InferenceRequest) -> dict[str, Any]:
    """From the tensor `sampling_parameters`, JSON, or else from the request's parameters. Raises InvalidArgument."""
    tensor = request.inputs.get("sampling_parameters")
    given: Mapping[str, Any] = request.parameters or {}
    if tensor is not None:
        try:
            given = orjson.loads(_text(tensor) or "{}")
        except orjson.JSONDecodeError as error:
            raise InvalidArgument(f"sampling_parameters is not JSON: {error}") from None
        if not isinstance(given, Mapping):
            raise InvalidArgument("sampling_parameters must be a JSON object")
    found: dict[str, Any] = {}
    for name, value in given.items():
        if name in PASSED_OVER or name.startswith(("triton_", "sequence_", "header_")):
            continue
        found[name] = _parameter(name, value)
    return found


def _parameter(name: str, value: Any) -> Any:
    """One sampling parameter, which clients also send as text."""
    try:
        if name in _INTEGERS:
            return _within(int(value), *_INTEGERS[name])
        if name in _NUMBERS:
            return _within(float(value), *_NUMBERS[name])
        if name in _FLAGS:
            return value if isinstance(value, bool) else str(value).lower() == "true"
        if name == "stop":
            stops = [value] if isinstance(value, str) else list(value)
            if len(stops) > _MOST_STOPS or not all(_is_stop(stop) for stop in stops):
                raise ValueError
            return stops
        if name == "lora_name":
            return str(value)
    except (TypeError, ValueError, OverflowError):
        raise InvalidArgument(f"sampling parameter '{name}' cannot be {value!r:.100}{_range_of(name)}") from None
    known = ", ".join((*_NUMBERS, *_INTEGERS, *_FLAGS, "stop", "lora_name"))
    raise InvalidArgument(f"unknown sampling parameter '{name[:100]}'; there are: {known}")


def _within(number: N, least: float, most: float) -> N:
    if not least <= number <= most:  # NaN is within nothing
        raise ValueError
    return number


def _is_stop(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= _LONGEST_STOP


def _range_of(name: str) -> str:
    if name == "stop":
        return f": {_MOST_STOPS} texts of 1 to {_LONGEST_STOP} characters at most"
    least, most = _INTEGERS.get(name) or _NUMBERS.get(name) or (None, None)
    return "" if least is None else f": it is {least} to {most}"


def _flag(inputs: Mapping[str, Tensor], name: str) -> bool:
    tensor = inputs.get(name)
    return tensor is not None and bool(tensor.array.ravel()[0])


def _text(tensor: Tensor) -> str:
    return _decoded(tensor.array.ravel()[0])


def _decoded(value: Any) -> str:
    try:
        return value.decode() if isinstance(value, bytes) else str(value)
    except UnicodeDecodeError:
        raise InvalidArgument("a text is not UTF-8") from None


def _strings(name: str, *values: bytes) -> Tensor:
    return Tensor(name, BYTES, object_array(values, (len(values),)))


def _as_vllm(entry: Mapping[str, Any]) -> dict[str, Any]:
    """One token's log probabilities as vLLM writes them: by token id, where the engine gives ids."""
    tops = entry.get("top_logprobs") or [entry]
    return {
        str(top.get("id", top["token"])): {"logprob": top["logprob"], "rank": rank, "decoded_token": top["token"]}
        for rank, top in enumerate(tops, 1)
    }
