"""EnsembleScheduler: which step runs when, with what, and what comes of it. The steps' models are under the test's
control; expected texts and rules are Triton's (core, ensemble_scheduler.cc)."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from google.protobuf import text_format

from doorstep import proto
from doorstep.config.model import ModelConfig
from doorstep.errors import BackendError, DoorstepError, ErrorCode, FailureReason, QueueRejected, Unavailable
from doorstep.request import InferenceRequest, InferenceResponse
from doorstep.scheduler.ensemble import EnsembleScheduler
from doorstep.scheduler.ensemble_graph import crossing
from doorstep.services import Services
from doorstep.stats import ModelStatistics
from doorstep.types import FP32, INT64, Array, Tensor


def config_of(name: str, inputs: str, outputs: str, rest: str = "") -> ModelConfig:
    """Tensors are FP32 [ 2 ]; a name with `?` is optional."""
    text = "".join(
        f'input {{ name: "{n.rstrip("?")}" data_type: TYPE_FP32 dims: [ 2 ] optional: {str(n.endswith("?")).lower()} }}'
        for n in inputs.split()
    )
    text += "".join(f'output {{ name: "{n}" data_type: TYPE_FP32 dims: [ 2 ] }}' for n in outputs.split())
    message = proto.ModelConfig(name=name)
    text_format.Parse(text + rest, message)
    return ModelConfig.from_proto(message)


def step(model: str, inputs: dict[str, str], outputs: dict[str, str], version: int = -1) -> str:
    maps = [("input_map", inputs), ("output_map", outputs)]
    text = " ".join(f'{m} {{ key: "{k}" value: "{v}" }}' for m, pairs in maps for k, v in pairs.items())
    return f'step {{ model_name: "{model}" model_version: {version} {text} }} '


class StepModel:
    """Keeps what it is asked until the test answers."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.requests: list[InferenceRequest] = []
        self.held = 0
        self.refuse_with: DoorstepError | None = None
        self.at_once: Callable[[InferenceRequest], None] | None = None

    def hold(self) -> None:
        self.held += 1

    def release(self) -> None:
        self.held -= 1

    def infer(self, request: InferenceRequest) -> None:
        if self.refuse_with is not None:
            raise self.refuse_with
        self.requests.append(request)
        request.on_cancel = self.cancelled
        if self.at_once is not None:
            self.at_once(request)

    enqueue = infer

    def cancelled(self, request: InferenceRequest) -> None:
        request.sender.send(InferenceResponse(self.config.name, "1", "", error=BackendError("cancelled")), True)

    def answer(self, index: int = 0, *, final: bool = True, parameters: Any = None, **outputs: float) -> None:
        tensors = [Tensor(name, FP32, np.full(2, value, np.float32)) for name, value in outputs.items()]
        response = InferenceResponse(self.config.name, "1", "", tensors, parameters=parameters)
        self.requests[index].sender.send(response, final)

    def end(self, index: int = 0) -> None:
        self.requests[index].sender.send(InferenceResponse(self.config.name, "1", "", flag_only=True), True)

    def fail(self, error: DoorstepError, index: int = 0) -> None:
        self.requests[index].sender.send(InferenceResponse(self.config.name, "1", "", error=error), True)


class Client:
    def __init__(self) -> None:
        self.responses: list[tuple[InferenceResponse, bool]] = []

    def send(self, response: InferenceResponse, final: bool) -> None:
        assert not any(final for _, final in self.responses), "a response after the final one"
        self.responses.append((response, final))

    @property
    def values(self) -> list[dict[str, float]]:
        return [{t.name: float(t.array.flat[0]) for t in r.outputs} for r, _ in self.responses]

    @property
    def error(self) -> DoorstepError:
        ((response, final),) = self.responses
        assert final
        assert response.error is not None
        return response.error


class World:
    def __init__(self, ensemble: ModelConfig, *models: ModelConfig, loop: asyncio.AbstractEventLoop) -> None:
        self.models = {config.name: StepModel(config) for config in models}
        self.stats = ModelStatistics()
        self.now = 1000
        self.scheduler = EnsembleScheduler(
            ensemble, "1", self.stats, Services(model=self.find), loop, clock=lambda: self.now
        )

    def find(self, name: str, version: str) -> StepModel:
        if name not in self.models:
            raise Unavailable(f"Request for unknown model: '{name}' version 1 is not at ready state")
        return self.models[name]

    def __getitem__(self, name: str) -> StepModel:
        return self.models[name]

    def infer(self, *, outputs: tuple[str, ...] = (), **inputs: float) -> tuple[InferenceRequest, Client]:
        client = Client()
        tensors = {name: Tensor(name, FP32, np.full(2, value, np.float32)) for name, value in inputs.items()}
        request = InferenceRequest("e", tensors, client, id="r1", requested_outputs=outputs, received_ns=self.now)
        self.scheduler.enqueue(request)
        return request, client

    def given(self, name: str, index: int = 0) -> dict[str, float]:
        return {n: float(t.array.flat[0]) for n, t in self[name].requests[index].inputs.items()}

    def at_rest(self) -> bool:
        return not self.scheduler.inflight_count and not any(model.held for model in self.models.values())


@pytest.fixture
def loop() -> Any:
    made = asyncio.new_event_loop()
    yield made
    made.close()


def ensemble(inputs: str, outputs: str, *steps: str, rest: str = "") -> ModelConfig:
    return config_of("e", inputs, outputs, f'{rest} platform: "ensemble" ensemble_scheduling {{ {"".join(steps)} }}')


A, B, C = (config_of(name, "x", "y") for name in "abc")
TWO = config_of("two", "x1 x2", "y")
LINE = (step("a", {"x": "IN"}, {"y": "t"}), step("b", {"x": "t"}, {"y": "OUT"}))


def test_a_step_runs_as_soon_as_its_inputs_are_there(loop: Any) -> None:
    diamond = ensemble(
        "IN", "OUT",
        step("two", {"x1": "t", "x2": "u"}, {"y": "OUT"}),
        step("a", {"x": "IN"}, {"y": "t"}),
        step("b", {"x": "IN"}, {"y": "u"}),
    )  # fmt: skip
    world = World(diamond, A, B, TWO, loop=loop)
    _, client = world.infer(IN=5)
    assert (world.given("a"), world.given("b")) == ({"x": 5}, {"x": 5})
    world["b"].answer(y=2)
    assert world["two"].requests == []
    world["a"].answer(y=1)
    assert world.given("two") == {"x1": 1, "x2": 2}
    assert world.scheduler.inflight_count == 1
    world["two"].answer(y=3)
    assert client.values == [{"OUT": 3}]
    assert world.at_rest()


def test_only_the_steps_that_are_needed_run(loop: Any) -> None:
    fork = ensemble("IN", "P Q", step("a", {"x": "IN"}, {"y": "P"}), step("b", {"x": "P"}, {"y": "Q"}))
    world = World(fork, A, B, loop=loop)
    _, client = world.infer(IN=1, outputs=("P",))
    world["a"].answer(y=7)
    assert client.values == [{"P": 7}]
    assert world["b"].requests == []
    _, client = world.infer(IN=1, outputs=("Q",))
    world["a"].answer(1, y=7)
    world["b"].answer(y=8)
    assert client.values == [{"Q": 8}]
    assert world.at_rest()


def test_what_the_request_says_goes_to_every_step(loop: Any) -> None:
    world = World(ensemble("IN", "OUT", *LINE), A, B, loop=loop)
    client = Client()
    request = InferenceRequest(
        "e", {"IN": Tensor("IN", FP32, np.zeros(2, np.float32))}, client, id="mine", parameters={"k": 1}
    )
    request.priority, request.timeout_us, request.correlation_id, request.sequence_start = 3, 500, 42, True
    world.scheduler.enqueue(request)
    world["a"].answer(y=1)
    for name in "ab":
        (got,) = world[name].requests
        assert (got.id, got.parameters, got.priority, got.timeout_us) == ("mine", {"k": 1}, 3, 500)
        assert (got.correlation_id, got.sequence_start, got.sequence_end) == (42, True, False)
    world["b"].answer(y=2)
    assert client.responses[0][0].parameters == {"sequence_id": 42, "sequence_start": True, "sequence_end": False}


def test_a_response_may_put_what_follows_into_another_sequence(loop: Any) -> None:
    world = World(ensemble("IN", "OUT", *LINE), A, B, loop=loop)
    _, client = world.infer(IN=1)
    world["a"].answer(y=1, parameters={"sequence_id": 9, "sequence_end": True})
    (got,) = world["b"].requests
    assert (got.correlation_id, got.sequence_start, got.sequence_end) == (9, False, True)
    world["b"].answer(y=2)
    assert client.responses[0][0].parameters == {"sequence_id": 9, "sequence_start": False, "sequence_end": True}


@pytest.mark.parametrize(("parameters", "text"), [
    ({"sequence_id": 1.5}, "expected parameter 'sequence_id' to be TRITONSERVER_PARAMETER_INT or "
                           "TRITONSERVER_PARAMETER_STRING"),
    ({"sequence_start": 1}, "expect parameter 'sequence_start' to be TRITONSERVER_PARAMETER_BOOL"),
])  # fmt: skip
def test_such_a_response_must_be_of_the_right_types(loop: Any, parameters: Any, text: str) -> None:
    world = World(ensemble("IN", "OUT", *LINE), A, B, loop=loop)
    _, client = world.infer(IN=1)
    world["a"].answer(y=1, parameters=parameters)
    assert client.error.message.startswith(f"in ensemble 'e', {text}")
    assert world.at_rest()


def test_what_was_left_out_is_left_out_of_the_steps_that_can_do_without(loop: Any) -> None:
    maybe = config_of("maybe", "x? z?", "y")
    world = World(
        ensemble("IN OPT?", "OUT",
                 step("a", {"x": "IN"}, {"y": "t"}), step("maybe", {"x": "t", "z": "OPT"}, {"y": "OUT"})),
        A, maybe, loop=loop,
    )  # fmt: skip
    _, client = world.infer(IN=1)
    world["a"].answer()  # no output at all
    assert world.given("maybe") == {}
    world["maybe"].answer(y=4)
    assert client.values == [{"OUT": 4}]
    assert world.at_rest()


def test_a_step_that_fails_is_named_and_stops_the_others(loop: Any) -> None:
    fork = ensemble("IN", "P Q", step("a", {"x": "IN"}, {"y": "P"}), step("b", {"x": "IN"}, {"y": "Q"}))
    world = World(fork, A, B, loop=loop)
    _, client = world.infer(IN=1)
    world["a"].fail(BackendError("no luck"))
    assert client.error.message == "in ensemble 'e', no luck (step 0, model 'a')"
    assert client.error.code is ErrorCode.INTERNAL
    assert world["b"].requests[0].cancelled
    assert world.stats.fail_count == 1
    assert +Counter(world.stats.failures) == {FailureReason.OTHER: 1}, "the reason is the step's"
    assert world.at_rest()


def test_an_ensemble_in_an_ensemble_names_the_step_once(loop: Any) -> None:
    inner = World(ensemble("IN", "OUT", *LINE), A, B, loop=loop)
    outer_config = config_of(
        "outer",
        "IN",
        "OUT",
        f'platform: "ensemble" ensemble_scheduling {{ {step("e", {"IN": "IN"}, {"OUT": "OUT"})} }}',
    )
    middle = StepModel(ensemble("IN", "OUT", *LINE))
    middle.at_once = inner.scheduler.enqueue
    stats = ModelStatistics()
    outer = EnsembleScheduler(outer_config, "1", stats, Services(model=lambda name, version: middle), loop)
    client = Client()
    tensors = {"IN": Tensor("IN", FP32, np.zeros(2, np.float32))}
    outer.enqueue(InferenceRequest("outer", tensors, client))
    inner["a"].fail(BackendError("no luck"))
    assert client.error.message == "in ensemble 'outer', in ensemble 'e', no luck (step 0, model 'a')"
    assert inner.at_rest()
    assert outer.inflight_count == middle.held == 0


@pytest.mark.parametrize("error", [QueueRejected("Exceeds maximum queue size"), Unavailable("no")])
def test_a_step_that_is_refused_fails_the_whole(loop: Any, error: DoorstepError) -> None:
    world = World(ensemble("IN", "OUT", *LINE), A, B, loop=loop)
    world["b"].refuse_with = error
    _, client = world.infer(IN=1)
    world["a"].answer(y=1)
    assert client.error.message == f"in ensemble 'e', {error.message} (step 1, model 'b')"
    assert client.error.code is error.code
    assert world.at_rest()


def test_a_step_whose_model_is_gone_fails_the_whole(loop: Any) -> None:
    world = World(ensemble("IN", "OUT", *LINE), A, loop=loop)
    _, client = world.infer(IN=1)
    text = "in ensemble 'e', Request for unknown model: 'b' version 1 is not at ready state"
    assert client.error.message == text
    assert client.error.code is ErrorCode.UNAVAILABLE
    assert world["a"].requests == []
    assert world.at_rest()


def test_cancelling_the_whole_cancels_its_steps(loop: Any) -> None:
    world = World(ensemble("IN", "OUT", *LINE), A, B, loop=loop)
    request, client = world.infer(IN=1)
    request.cancel()
    assert client.error.code is ErrorCode.CANCELLED
    assert world["a"].requests[0].cancelled
    assert world["b"].requests == []
    assert +Counter(world.stats.failures) == {FailureReason.CANCELED: 1}
    assert world.at_rest()


STREAM = config_of("s", "x", "y", "model_transaction_policy { decoupled: true }")
DECOUPLED = "model_transaction_policy { decoupled: true }"


def test_each_response_of_a_decoupled_step_goes_its_own_way(loop: Any) -> None:
    world = World(
        ensemble("IN", "P Q",
                 step("s", {"x": "IN"}, {"y": "P"}), step("a", {"x": "P"}, {"y": "Q"}), rest=DECOUPLED),
        STREAM, A, loop=loop,
    )  # fmt: skip
    _, client = world.infer(IN=1)
    world["s"].answer(y=10, final=False)
    world["s"].answer(y=20, final=False)
    world["s"].end()
    assert [world.given("a", i) for i in (0, 1)] == [{"x": 10}, {"x": 20}]
    world["a"].answer(1, y=21)  # out of order: what belongs together stays so
    world["a"].answer(0, y=11)
    assert client.values == [{"P": 20, "Q": 21}, {"P": 10, "Q": 11}]
    assert [final for _, final in client.responses] == [False, True]
    assert world.at_rest()


def test_a_decoupled_step_may_say_nothing_and_end_after_the_last_answer(loop: Any) -> None:
    config = ensemble("IN", "OUT", step("s", {"x": "IN"}, {"y": "OUT"}), rest=DECOUPLED)
    world = World(config, STREAM, loop=loop)
    _, silent = world.infer(IN=1)
    world["s"].end()
    assert [(r.flag_only, final) for r, final in silent.responses] == [(True, True)]
    _, client = world.infer(IN=1)
    world["s"].answer(1, y=1, final=False)
    world["s"].end(1)
    assert [(r.flag_only, final) for r, final in client.responses] == [(False, False), (True, True)]
    assert world.at_rest()


def test_long_streams_leave_nothing_behind(loop: Any) -> None:
    world = World(
        ensemble("IN", "OUT", step("s", {"x": "IN"}, {"y": "t"}), step("a", {"x": "t"}, {"y": "OUT"}), rest=DECOUPLED),
        STREAM, A, loop=loop,
    )  # fmt: skip
    world["a"].at_once = lambda request: world["a"].answer(-1, y=1)
    _, client = world.infer(IN=1)
    run: Any = world["s"].requests[0].sender.run  # type: ignore[attr-defined]
    for _ in range(1000):
        world["s"].answer(y=1, final=False)
        assert len(run._rounds) <= 1
    world["s"].end()
    assert len(client.responses) == 1001
    assert world.at_rest()


def test_an_output_that_never_comes_is_an_error(loop: Any) -> None:
    world = World(ensemble("IN", "OUT", *LINE), A, B, loop=loop)
    _, client = world.infer(IN=1)
    world["a"].end()
    text = "unexpected deadlock, at least one output is not set while no more ensemble steps can be made"
    assert client.error.message == f"in ensemble 'e', [request id: r1] {text}"
    assert world.at_rest()


def test_an_input_that_must_not_be_left_out_leaves_the_steps_waiting(loop: Any) -> None:
    both = ensemble("IN MORE?", "OUT", step("two", {"x1": "IN", "x2": "MORE"}, {"y": "OUT"}))
    world = World(both, TWO, loop=loop)
    _, client = world.infer(MORE=1)
    assert "unexpected deadlock" in client.error.message
    assert world["two"].requests == []
    assert world.at_rest()


def test_hundreds_of_steps_that_answer_at_once_are_no_recursion(loop: Any) -> None:
    count = 2000
    steps = [step("a", {"x": "IN" if i == 0 else f"t{i}"}, {"y": f"t{i + 1}" if i < count - 1 else "OUT"})
             for i in range(count)]  # fmt: skip
    world = World(ensemble("IN", "OUT", *steps), A, loop=loop)
    world["a"].at_once = lambda request: world["a"].answer(-1, y=1)
    _, client = world.infer(IN=1)
    assert client.values == [{"OUT": 1}]
    assert world.at_rest()


LIMITED = config_of(
    "e", "IN", "OUT", f'platform: "ensemble" ensemble_scheduling {{ max_inflight_requests: 2 {"".join(LINE)} }}'
)


def test_at_most_so_many_requests_are_in_flight_at_a_step(loop: Any) -> None:
    world = World(LIMITED, A, B, loop=loop)
    clients = [world.infer(IN=i)[1] for i in range(5)]
    assert [world.given("a", i)["x"] for i in range(len(world["a"].requests))] == [0, 1]
    assert world.scheduler.queued_count == 3
    world["a"].answer(0, y=1)
    assert len(world["a"].requests) == 3
    assert len(world["b"].requests) == 1
    for i in range(1, 5):
        world["a"].answer(i, y=1)
    for i in range(5):
        world["b"].answer(i, y=i)
    assert [client.values for client in clients] == [[{"OUT": i}] for i in range(5)]
    assert world.scheduler.queued_count == 0
    assert world.at_rest()


def test_what_waits_for_its_turn_can_be_cancelled(loop: Any) -> None:
    world = World(LIMITED, A, B, loop=loop)
    requests = [world.infer(IN=i)[0] for i in range(4)]
    requests[2].cancel()
    assert world.scheduler.queued_count == 1
    requests[0].cancel()
    assert [world.given("a", i)["x"] for i in range(len(world["a"].requests))] == [0, 1, 3]
    for request in requests:
        request.cancel()
    assert world.at_rest()


def test_thousands_that_wait_are_let_in_without_recursion(loop: Any) -> None:
    world = World(LIMITED, A, B, loop=loop)
    clients = [world.infer(IN=i)[1] for i in range(3000)]
    for name in "ab":
        world[name].at_once = lambda request, name=name: world[name].answer(-1, y=1)  # type: ignore[misc]
    world["a"].answer(0, y=1)
    world["a"].answer(1, y=1)
    assert all(client.values == [{"OUT": 1}] for client in clients)
    assert world.at_rest()


def test_the_numbers_of_the_whole_are_the_sum_of_the_steps(loop: Any) -> None:
    world = World(ensemble("IN", "OUT", *LINE), A, B, loop=loop)
    _, _ = world.infer(IN=1)
    for name in "ab":
        world[name].requests[0].tally.add(1, 20, 300)
        world.now += 1000
        world[name].answer(y=1)
    stats = world.stats
    assert (stats.success_count, stats.success_ns, stats.queue_ns) == (1, 2000, 0)
    assert (stats.compute_input_ns, stats.compute_infer_ns, stats.compute_output_ns) == (2, 40, 600)
    assert (stats.execution_count, stats.inference_count) == (1, 1)
    assert list(stats.batches) == [1]


def test_a_scheduler_that_stops_refuses_and_drains(loop: Any) -> None:
    world = World(ensemble("IN", "OUT", *LINE), A, B, loop=loop)
    _, client = world.infer(IN=1)
    world.scheduler.stop()
    with pytest.raises(QueueRejected, match="Server is stopping"):
        world.infer(IN=1)
    drained = loop.create_task(world.scheduler.drained())
    loop.run_until_complete(asyncio.wait([drained], timeout=0))
    assert not drained.done()
    world["a"].answer(y=1)
    world["b"].answer(y=1)
    loop.run_until_complete(drained)
    assert client.values == [{"OUT": 1}]


@pytest.mark.parametrize(("from_batching", "to_batching", "dims", "shape", "expected"), [
    (False, False, (2,), (2,), (2,)),
    (True, True, (2,), (5, 2), (5, 2)),
    (False, True, (2,), (2,), (1, 2)),  # just its dims: a batch of one
    (False, True, (2,), (5, 2), (5, 2)),  # a batch already
    (False, True, (-1, 2), (7, 2), (1, 7, 2)),
    (True, False, (2,), (1, 2), (2,)),  # a batch of one
    (True, False, (2,), (3, 2), (3, 2)),  # left as it is, and refused by the model
    (True, False, (-1, 2), (1, 2), (1, 2)),  # the batch is among its dims
    (True, False, (-1, 2), (4, 2), (4, 2)),
])  # fmt: skip
def test_shapes_change_between_models_that_batch_and_others(
    from_batching: bool, to_batching: bool, dims: tuple[int, ...], shape: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    convert = crossing(from_batching, to_batching, dims)
    array: Array = np.zeros(shape, np.float32)
    assert (array if convert is None else convert(array)).shape == expected


def test_a_stream_pauses_while_what_follows_is_at_its_limit_or_the_client_is_slow(loop: Any) -> None:
    text = (
        f'platform: "ensemble" {DECOUPLED} ensemble_scheduling {{ max_inflight_requests: 1 '
        f"{step('s', {'x': 'IN'}, {'y': 't'})} {step('a', {'x': 't'}, {'y': 'OUT'})} }}"
    )
    world = World(config_of("e", "IN", "OUT", text), STREAM, A, loop=loop)
    request, client = world.infer(IN=1)
    (stream,) = world["s"].requests
    went_on: list[InferenceRequest] = []
    stream.on_room = went_on.append
    world["s"].answer(y=1, final=False)
    assert not stream.stalled
    world["s"].answer(y=2, final=False)
    assert stream.stalled
    world["a"].answer(0, y=1)
    assert not stream.stalled
    assert went_on == [stream]

    request.stalled = True  # as a sender does whose client does not read
    world["a"].answer(1, y=2)
    assert stream.stalled
    request.room()
    assert not stream.stalled
    assert went_on == [stream, stream]
    world["s"].end()
    assert client.values == [{"OUT": 1}, {"OUT": 2}, {}]
    assert world.at_rest()


def test_a_steps_request_has_every_field_a_request_has(loop: Any) -> None:
    """Its constructor sets them by itself, for speed: a field that is added to requests must be added there."""
    world = World(ensemble("IN", "OUT", *LINE), A, B, loop=loop)
    world.infer(IN=5)
    [request] = world["a"].requests
    assert [field for field in InferenceRequest.__slots__ if not hasattr(request, field)] == []


def test_a_step_is_validated_again_when_its_input_has_another_shape_or_datatype(loop: Any) -> None:
    world = World(ensemble("IN", "OUT", *LINE), A, B, loop=loop)
    validated: list[tuple[int, ...]] = []
    for name in "ab":
        model = world[name]
        model.infer = lambda request, model=model: (  # type: ignore[method-assign]
            validated.append(request.inputs["x"].array.shape), model.enqueue(request)
        )  # fmt: skip
    for _ in range(2):
        world.infer(IN=5)
    assert validated == [(2,)]  # the first step's, once
    tensor = Tensor("IN", FP32, np.zeros(3, np.float32))
    world.scheduler.enqueue(InferenceRequest("e", {"IN": tensor}, Client()))
    assert validated == [(2,), (3,)]
    tensor = Tensor("IN", INT64, np.zeros(3, np.int64))
    world.scheduler.enqueue(InferenceRequest("e", {"IN": tensor}, Client()))
    assert validated == [(2,), (3,), (3,)]
