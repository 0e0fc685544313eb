"""Calls of other models by pb_utils, on a server of functions; DLPack; what only the newer Triton has."""

from __future__ import annotations

import asyncio
import gc
import threading

import ml_dtypes
import numpy as np
import pytest

from doorstep.backends.python import triton_compat as pb_utils
from doorstep.backends.python import triton_runtime
from doorstep.backends.python.triton_runtime import Phase
from doorstep.errors import BackendError, ErrorCode, InvalidArgument, QueueRejected
from doorstep.request import Outputs
from doorstep.testing.server_access import FakeServer
from doorstep.types import INT32, Tensor


def ints(*values: int, **parameters) -> Outputs:
    return Outputs([Tensor("Y", INT32, np.array(values, np.int32))], parameters or None)


def call(model: str = "m", **rest) -> pb_utils.InferenceRequest:
    return pb_utils.InferenceRequest(
        model_name=model, requested_output_names=["Y"], inputs=[pb_utils.Tensor("X", np.zeros(1))], **rest
    )


@pytest.fixture
def serve():
    """Makes a server the one that model code asks."""

    def start(server: FakeServer) -> FakeServer:
        from doorstep.backends.python import triton_calls

        triton_calls._plain.clear()
        triton_runtime.set_up("", None, server)
        triton_runtime.become(Phase.SERVING)
        return server

    yield start
    triton_runtime.set_up("", None, None)


def test_a_call_says_everything_and_gets_parameters_back(serve):
    server = serve(FakeServer({"m": lambda _: [(ints(1, n=3, s="x"), True)]}))
    request = call(
        request_id="r", correlation_id="seq", model_version=4, timeout=9, parameters={"k": True},
        flags=pb_utils.TRITONSERVER_REQUEST_FLAG_SEQUENCE_START | pb_utils.TRITONSERVER_REQUEST_FLAG_SEQUENCE_END,
    )  # fmt: skip
    response = request.exec()
    assert response.output_tensors()[0].as_numpy().tolist() == [1]
    assert response.parameters() == '{"n": 3, "s": "x"}'
    (sent,) = server.calls
    assert (sent.id, sent.correlation_id, sent.model_version, sent.timeout_us) == ("r", "seq", "4", 9)
    assert (sent.sequence_start, sent.sequence_end, sent.parameters) == (True, True, {"k": True})
    assert list(sent.requested_outputs) == ["Y"]


@pytest.mark.parametrize(
    ("error", "text", "code"),
    [
        (BackendError("it failed", code=ErrorCode.UNAVAILABLE), "it failed", pb_utils.TritonError.UNAVAILABLE),
        (InvalidArgument("bad"), "Model m - Error when running inference: bad", pb_utils.TritonError.INTERNAL),
        (QueueRejected("full"), "Model m - Error when running inference: full", pb_utils.TritonError.INTERNAL),
    ],
)
def test_errors_are_responses(serve, error, text, code):
    serve(FakeServer({"m": lambda _: [(error, True)]}))
    response = call().exec()
    assert response.has_error()
    assert (response.error().message(), response.error().code()) == (text, code)


@pytest.mark.parametrize("phase", [Phase.LOADING, Phase.ENDING])
def test_models_are_called_only_while_this_one_serves(serve, phase):
    serve(FakeServer({"m": lambda _: []}))
    triton_runtime.become(phase)
    with pytest.raises(pb_utils.TritonModelException, match="BLS is only supported during the 'execute' function"):
        call().exec()


def test_an_iterator_may_be_awaited_and_cancelled(serve):
    server = serve(FakeServer({"m": lambda _: [(ints(1), False)]}, decoupled=["m"]))

    async def main() -> list:
        responses = await call().async_exec(decoupled=True)
        got = []
        async for response in responses:
            got.append([t.as_numpy().tolist() for t in response.output_tensors()])
            if len(got) == 1:
                responses.cancel()
                assert server.responses[0].stopped.is_set()
                assert not server.responses[0].cancelled.is_set()
                server.responses[0].add(None, True)
        return got

    assert asyncio.run(main()) == [[[1]], []]


def test_a_cancelled_await_cancels_the_call(serve):
    server = serve(FakeServer({"m": lambda _: []}))

    async def main() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(call().async_exec(), 0.01)

    asyncio.run(main())
    assert server.responses[0].cancelled.is_set()


def test_files_of_a_model_are_sent_one_after_the_other(serve):
    server = serve(FakeServer(answers={"load_model": lambda *_: None}))
    pb_utils.load_model("m", config="{}", files={"file:1/a": b"ab", "file:1/b": b"c"})
    payload = {"name": "m", "config": "{}", "files": [["file:1/a", 2], ["file:1/b", 1]], "loading": False}
    assert server.asked == [("load_model", payload, b"abc")]


@pytest.mark.parametrize("dtype", [bool, "u1", "i2", "u4", "i8", "f2", "f4", "f8", ml_dtypes.bfloat16])
def test_dlpack_shares_memory_both_ways_read_only_arrays_too(dtype):
    array = np.arange(6).reshape(2, 3).astype(dtype)
    array.flags.writeable = False
    given = pb_utils.Tensor("a", array)
    taken = pb_utils.Tensor.from_dlpack("b", given.to_dlpack())
    assert taken._array.dtype == array.dtype
    assert taken._array.tolist() == array.tolist()
    assert np.shares_memory(taken._array, array)
    del given, array
    gc.collect()
    assert taken._array.tolist() == np.arange(6).reshape(2, 3).astype(dtype).tolist()
    pb_utils.Tensor("c", np.zeros(2)).to_dlpack()  # nobody takes it: freed with the capsule


def test_bf16_has_no_numpy_array_as_in_triton():
    with pytest.raises(pb_utils.TritonModelException, match="Tensor dtype is BF16 and cannot be converted to NumPy"):
        pb_utils.Tensor("a", np.zeros(1, ml_dtypes.bfloat16)).as_numpy()


@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        ({1: "a"}, "Expect parameters keys to have type str, found type <class 'int'>"),
        ({"a": 1.5}, "Expect parameters values to have type bool/int/str, found type <class 'float'>"),
    ],
)
def test_parameters_of_other_types_are_refused(parameters, text):
    for make in (lambda: pb_utils.InferenceResponse(parameters=parameters), lambda: call(parameters=parameters)):
        with pytest.raises(pb_utils.TritonModelException) as raised:
            make()
        assert str(raised.value) == text


def test_a_metric_goes_with_its_family(serve):
    numbers = iter(range(1, 9))
    answers = {name: lambda *_: {"id": next(numbers)} for name in ("metric_family", "metric")}
    done = threading.Event()
    server = serve(
        FakeServer(answers={**answers, "metric_forget": lambda payload, _: payload["id"] == 1 and done.set()})
    )
    family = pb_utils.MetricFamily("n", "d", pb_utils.MetricFamily.HISTOGRAM)
    metric = family.Metric(labels={"a": "b"}, buckets=[1, 2.5])
    metric.observe(2)
    assert server.asked[1:] == [
        ("metric", {"family": 1, "labels": {"a": "b"}, "buckets": [1.0, 2.5]}, b""),
        ("metric_update", {"id": 2, "op": "observe", "value": 2.0}, b""),
    ]
    del family
    gc.collect()
    assert done.wait(30)
    assert [payload["id"] for what, payload, _ in server.asked if what == "metric_forget"] == [2, 1]
    with pytest.raises(pb_utils.TritonModelException, match="corresponding 'MetricFamily' has been deleted"):
        metric.observe(1)
