"""Whether the models of an ensemble's steps fit, as a table. Texts are Triton's (core, ensemble_utils.cc)."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf import text_format

from doorstep import proto
from doorstep.config.check_ensemble_graph import check_ensemble_graph


def io(direction: str, name: str, dims: str = "2", kind: str = "FP32", extra: str = "") -> str:
    return f'{direction} {{ name: "{name}" data_type: TYPE_{kind} dims: [ {dims} ] {extra} }} '


def model(name: str, *tensors: str, rest: str = "") -> Any:
    return text_format.Parse("".join(tensors) + rest, proto.ModelConfig(name=name))


def step(name: str, inputs: dict[str, str], outputs: dict[str, str]) -> str:
    maps = [("input_map", inputs), ("output_map", outputs)]
    text = " ".join(f'{m} {{ key: "{k}" value: "{v}" }}' for m, pairs in maps for k, v in pairs.items())
    return f'step {{ model_name: "{name}" model_version: -1 {text} }} '


DECOUPLED = "model_transaction_policy { decoupled: true }"
MODELS = {
    ("", config.name): config
    for config in (
        model("a", io("input", "x"), io("output", "y")),
        model("b", io("input", "x"), io("output", "y"), rest="max_batch_size: 4"),
        model("wide", io("input", "x", "-1, 2"), io("output", "y", "-1, 2")),
        model(
            "two", io("input", "x1"), io("input", "x2", extra="optional: true"), io("output", "y1"), io("output", "y2")
        ),
        model("ints", io("input", "x", kind="INT32"), io("output", "y", kind="INT32")),
        model("s", io("input", "x"), io("output", "y"), io("output", "z"), rest=DECOUPLED),
    )
}
IN, OUT = io("input", "IN"), io("output", "OUT")
FIRST = step("a", {"x": "IN"}, {"y": "OUT"})


def problems(*text: str) -> tuple[list[tuple[str, str]], bool]:
    steps = [line for line in text if line.startswith("step")]
    rest = [line for line in text if not line.startswith("step")]
    ensemble = model("e", *rest, rest=f"ensemble_scheduling {{ {''.join(steps)} }}")
    found = [(p.where, p.what) for p in check_ensemble_graph(ensemble, MODELS)]
    return found, ensemble.model_transaction_policy.decoupled


S0, S1 = "ensemble_scheduling.step[0]", "ensemble_scheduling.step[1]"
MIXED = "receives inputs originated from different decoupled models"


@pytest.mark.parametrize(("text", "expected"), [
    ((IN, OUT, FIRST), []),
    ((io("input", "IN", kind="INT32"), OUT, FIRST),
     [(S0, "in ensemble e, ensemble tensor IN: inconsistent data type: TYPE_INT32 is inferred from model e while "
           "TYPE_FP32 is inferred from model a")]),
    ((io("input", "IN", "3"), OUT, FIRST),
     [(S0, "in ensemble e, ensemble tensor IN: inconsistent shape: [3] is inferred from model e while [2] is inferred "
           "from model a")]),
    ((io("input", "IN", "-1"), OUT, FIRST), []),
    ((io("input", "IN", "1, 2", extra="reshape { shape: [ 2 ] }"), OUT, FIRST), []),
    ((IN, OUT, step("a", {"x": "IN"}, {"y": "t"}), step("ints", {"x": "t"}, {"y": "OUT"})),
     [(S1, "in ensemble e, ensemble tensor t: inconsistent data type: TYPE_FP32 is inferred from model a while "
           "TYPE_INT32 is inferred from model ints"),
      (S1, "in ensemble e, ensemble tensor OUT: inconsistent data type: TYPE_FP32 is inferred from model e while "
           "TYPE_INT32 is inferred from model ints")]),
    # all at once, each named with its step
    ((IN, OUT, step("a", {"z": "IN"}, {"w": "OUT"})),
     [(f"{S0}.input_map", "in ensemble e, ensemble tensor IN is mapping to non-existing input z in model a"),
      (f"{S0}.input_map", "in ensemble e, input x in model a is not mapped to any ensemble tensors"),
      (f"{S0}.output_map", "in ensemble e, ensemble tensor OUT is mapped from non-existing output w in model a")]),
    ((IN, OUT, step("two", {"x1": "IN"}, {"y1": "OUT"})), []),
    ((IN, OUT, step("two", {"x2": "IN"}, {"y1": "OUT"})),
     [(f"{S0}.input_map", "in ensemble e, input x1 in model two is not mapped to any ensemble tensors")]),
    # between those that batch and those that do not
    ((IN, OUT, "max_batch_size: 8 ", step("b", {"x": "IN"}, {"y": "OUT"})),
     [("max_batch_size", "ensemble e allows maximum batch size 8, but it contains model b which only allows maximum "
                         "batch size to be 4")]),
    ((IN, OUT, "max_batch_size: 4 ", step("b", {"x": "IN"}, {"y": "OUT"})), []),
    ((IN, OUT, "max_batch_size: 4 ", FIRST), []),
    ((IN, OUT, "max_batch_size: 4 ", step("b", {"x": "IN"}, {"y": "t"}), step("wide", {"x": "t"}, {"y": "OUT"})), []),
])  # fmt: skip
def test_what_does_not_fit_is_named(text: tuple[str, ...], expected: list[tuple[str, str]]) -> None:
    assert problems(*text) == (expected, False)


@pytest.mark.parametrize(("text", "expected"), [
    ((IN, OUT, step("s", {"x": "IN"}, {"y": "OUT"})), []),
    ((IN, OUT, step("s", {"x": "IN"}, {"y": "t"}), step("a", {"x": "t"}, {"y": "OUT"})), []),
    ((IN, OUT, step("s", {"x": "IN"}, {"y": "t", "z": "u"}), step("two", {"x1": "t", "x2": "u"}, {"y1": "OUT"})), []),
    ((IN, OUT, step("s", {"x": "IN"}, {"y": "t"}), step("two", {"x1": "t", "x2": "IN"}, {"y1": "OUT"})),
     [(S1, f"in ensemble e, step of model 'e' {MIXED} (step 1, model 'two')")]),
    ((IN, io("output", "P"), io("output", "Q"), step("s", {"x": "IN"}, {"y": "P"}), step("a", {"x": "IN"}, {"y": "Q"})),
     [("output", f"in ensemble e, step of model 'e' {MIXED}")]),
])  # fmt: skip
def test_what_comes_of_a_decoupled_step_stays_together(text: tuple[str, ...], expected: list[tuple[str, str]]) -> None:
    assert problems(*text) == (expected, True)
