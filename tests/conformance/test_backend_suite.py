"""The conformance kit for backends, run on our own, and on backends that break one rule each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from doorstep.backends.base import Backend, InstanceContext, ModelInstance, TensorInstance
from doorstep.backends.identity import IdentityBackend
from doorstep.backends.onnxruntime import OnnxBackend
from doorstep.request import LATER, Batch
from doorstep.testing.backend_suite import BackendSuite, Case
from doorstep.testing.onnx_models import save_adder, save_identity, save_model
from doorstep.types import FP32, Array, Tensor


def save_lookup(folder: Path) -> None:
    """Fails at run time where the index is out of range."""
    save_model(
        folder / "model.onnx",
        [helper.make_node("Gather", ["table", "i"], ["y"])],
        [("i", TensorProto.INT64, ["N", 1])],
        [("y", TensorProto.FLOAT, ["N", 1])],
        [numpy_helper.from_array(np.array([10, 20, 30], np.float32), "table")],
    )


class TestOnnx(BackendSuite):
    backend = OnnxBackend

    def cases(self) -> list[Case]:
        x = np.array([[1.5], [2.5]], np.float32)
        words = np.array([[b"a", "ä".encode()]], np.object_)
        return [
            Case("adder", lambda folder: save_adder(folder / "model.onnx", 2), {"x": x}, {"y": x + 2}),
            Case(
                "lookup",
                save_lookup,
                {"i": np.array([[1]])},
                {"y": np.array([[20]], np.float32)},
                failing={"i": np.array([[7]])},
            ),
            Case(
                "texts",
                lambda folder: save_identity(folder / "model.onnx", TensorProto.STRING, ["N", 2]),
                {"x": words},
                {"y": words},
            ),
        ]

    def broken(self) -> Mapping[str, Callable[[Path], object]]:
        return {
            "nothing": lambda folder: None,
            "no model": lambda folder: (folder / "model.onnx").write_bytes(b"\x08\x01 not a model"),
        }


class TestIdentity(BackendSuite):
    backend = IdentityBackend

    def cases(self) -> list[Case]:
        config = 'max_batch_size: 4 input { name: "INPUT" data_type: TYPE_FP32 dims: 3 }'
        x = np.arange(3, dtype=np.float32).reshape(1, 3)
        return [Case("same", lambda folder: None, {"INPUT": x}, {"OUTPUT": x}, config)]


# Backends that break a rule: the test for that rule must say so.

CONFIG = """
max_batch_size: 4
input { name: "x" data_type: TYPE_FP32 dims: 2 }
output { name: "y" data_type: TYPE_FP32 dims: 2 }
"""
X = np.array([[1.0, 2.0]], np.float32)


class Doubling(TensorInstance):
    def run(self, inputs: Mapping[str, Array], outputs: tuple[str, ...]) -> Mapping[str, Array]:
        return {"y": inputs["x"] * 2}


def broken_backend(instance: Callable[[InstanceContext], ModelInstance]) -> type[Backend]:
    class Broken(Backend):
        name = "broken"

        def load_instance(self, context: InstanceContext) -> ModelInstance:
            return instance(context)

    return Broken


def suite_of(instance: Callable[[InstanceContext], ModelInstance], **case: Any) -> BackendSuite:
    class Suite(BackendSuite):
        backend = broken_backend(instance)

        def cases(self) -> list[Case]:
            return [Case("m", lambda folder: None, {"x": X}, {"y": X * 2}, CONFIG, **case)]

    return Suite()


class InPlace(Doubling):
    def run(self, inputs: Mapping[str, Array], outputs: tuple[str, ...]) -> Mapping[str, Array]:
        x = inputs["x"]
        x.setflags(write=True)
        x *= 2
        return {"y": x}


class OneBuffer(Doubling):
    """Gives the same array every time."""

    def run(self, inputs: Mapping[str, Array], outputs: tuple[str, ...]) -> Mapping[str, Array]:
        if not hasattr(self, "buffer"):
            self.buffer = np.empty((1, 2), np.float32)
        np.multiply(inputs["x"], 2, out=self.buffer)
        return {"y": self.buffer}


class FirstOnly(ModelInstance):
    """Answers the first request of a batch."""

    def __init__(self, context: InstanceContext) -> None: ...

    def execute(self, batch: Batch) -> None:
        batch.results[0] = [Tensor("y", FP32, batch.requests[0].inputs["x"].array * 2)]


class Counting(Doubling):
    count = 0

    def run(self, inputs: Mapping[str, Array], outputs: tuple[str, ...]) -> Mapping[str, Array]:
        self.count += 1
        return {"y": inputs["x"] * 2 if self.count < 3 else inputs["x"]}


class ForgetsOutputs(Doubling):
    def execute(self, batch: Batch) -> None:
        super().execute(batch)
        if batch.requests[0].requested_outputs:
            batch.results[0] = []


class Unstoppable(Doubling):
    held: list[object] = []

    def __init__(self, context: InstanceContext) -> None:
        super().__init__(context.config)
        self.held.append(self)


class Dying(Doubling):
    """Answers nothing after an error."""

    dead = False

    def run(self, inputs: Mapping[str, Array], outputs: tuple[str, ...]) -> Mapping[str, Array]:
        if self.dead or inputs["x"][0, 0] < 0:
            self.dead = True
            raise ValueError("negative")
        return super().run(inputs, outputs)


class Talkative(ModelInstance):
    """Says something after its last word."""

    def __init__(self, context: InstanceContext) -> None: ...

    def execute(self, batch: Batch) -> None:
        for i, request in enumerate(batch.requests):
            outputs = [Tensor("y", FP32, request.inputs["x"].array * 2)]
            batch.results[i] = LATER
            batch.emit(request, outputs, True)
            batch.emit(request, outputs, True)


def of(kind: type[Doubling]) -> Callable[[InstanceContext], ModelInstance]:
    return lambda context: kind(context.config)


@pytest.mark.parametrize(
    ("instance", "rule", "case"),
    [
        (of(InPlace), "test_inputs_are_left_as_they_are", {}),
        (of(OneBuffer), "test_outputs_stay_as_they_are", {}),
        (FirstOnly, "test_a_batch_gives_each_request_its_own", {}),
        (of(Counting), "test_answers_the_same_again_and_again", {}),
        (of(ForgetsOutputs), "test_only_some_outputs_may_be_asked_for", {}),
        (Unstoppable, "test_unloading_gives_back_the_instance", {}),
        (of(Dying), "test_a_request_that_fails_leaves_the_instance_working", {"failing": {"x": -X}}),
        (Talkative, "test_answers", {}),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_backend_that_breaks_a_rule_is_found_out(
    instance: Callable[[InstanceContext], ModelInstance], rule: str, case: dict[str, Any], tmp_path: Path
) -> None:
    suite = suite_of(instance, **case)
    with pytest.raises((AssertionError, ValueError)):
        getattr(suite, rule)(suite.cases()[0], tmp_path)


def test_a_backend_that_is_not_installed_is_told_how_it_becomes_so() -> None:
    with pytest.raises(AssertionError, match="no installed package has an entry point 'broken' in the group"):
        suite_of(of(Doubling)).test_is_found_by_its_name()


def test_a_model_that_loads_though_it_is_broken_is_found_out(tmp_path: Path) -> None:
    suite = suite_of(of(Doubling))
    suite.broken = lambda: {"anything": lambda folder: None}  # type: ignore[method-assign]
    with pytest.raises(AssertionError, match="it was loaded"):
        suite.test_a_broken_model_is_refused_with_a_reason("anything", tmp_path)
