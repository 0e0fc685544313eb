"""Inputs from a command line, and outputs on a terminal."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import orjson
import pytest

from doorstep.cli.infer import as_json, as_raw, as_text
from doorstep.cli.values import parse_inputs
from doorstep.errors import InvalidArgument


def metadata(**inputs: str) -> dict[str, Any]:
    return {"name": "m", "inputs": [{"name": n, "datatype": d, "shape": [-1]} for n, d in inputs.items()]}


ONE_TEXT = metadata(text="BYTES")
ONE_NUMBER = metadata(x="FP32")
MIXED = metadata(text="BYTES", x="FP32", flag="BOOL")


@pytest.mark.parametrize(
    ("items", "model", "expected"),
    [
        (["text=hello"], ONE_TEXT, {"text": "hello"}),
        (["text="], ONE_TEXT, {"text": ""}),
        (["hello world"], ONE_TEXT, {"text": "hello world"}),
        (["1 + 1 = 2"], ONE_TEXT, {"text": "1 + 1 = 2"}),
        (["text=a=b"], ONE_TEXT, {"text": "a=b"}),
        (['text=["a","b"]'], ONE_TEXT, {"text": ["a", "b"]}),
        (["text=[not json"], ONE_TEXT, {"text": "[not json"}),
        (["text=[1,2]"], ONE_TEXT, {"text": "[1,2]"}),
        (["text=@@home"], ONE_TEXT, {"text": "@home"}),
        (["x=1.5"], ONE_NUMBER, {"x": 1.5}),
        (["x=1,2,3"], ONE_NUMBER, {"x": [1, 2, 3]}),
        (["[[1,2],[3,4]]"], ONE_NUMBER, {"x": [[1, 2], [3, 4]]}),
        (["text=hi", "x=-1e3", "flag=true"], MIXED, {"text": "hi", "x": -1000.0, "flag": True}),
    ],
)
def test_values_are_what_the_model_makes_of_them(items: list[str], model: dict[str, Any], expected: Any) -> None:
    assert parse_inputs(items, model) == expected


@pytest.mark.parametrize(
    ("items", "model", "text"),
    [
        ([], ONE_TEXT, "wants inputs; its input is: text BYTES"),
        (["tekst=hello"], ONE_TEXT, "has no input 'tekst'; its input is: text BYTES"),
        (["hello"], MIXED, "'hello' names no input"),
        (["text=a", "text=b"], ONE_TEXT, "given twice"),
        (["x=one"], ONE_NUMBER, "neither a number nor JSON"),
        (["text=@/nowhere/at/all"], ONE_TEXT, "cannot read /nowhere/at/all: No such file"),
    ],
)
def test_what_makes_no_sense_is_explained(items: list[str], model: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse_inputs(items, model)
    assert text in str(caught.value)


def test_files_are_bytes_arrays_or_json(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n")
    np.save(tmp_path / "a.npy", np.arange(6.0).reshape(2, 3))
    (tmp_path / "a.json").write_text("[[1, 2]]")
    assert parse_inputs([f"text=@{tmp_path}/a.png"], ONE_TEXT) == {"text": b"\x89PNG\r\n"}
    assert parse_inputs([f"x=@{tmp_path}/a.npy"], ONE_NUMBER)["x"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert parse_inputs([f"x=@{tmp_path}/a.json"], ONE_NUMBER) == {"x": [[1, 2]]}
    with pytest.raises(InvalidArgument, match=r"must be a \.npy file"):
        parse_inputs([f"x=@{tmp_path}/a.png"], ONE_NUMBER)


def test_a_file_of_pickles_is_not_opened(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(InvalidArgument, match="allow_pickle=False"):
        parse_inputs([f"x=@{tmp_path}/a.npy"], ONE_NUMBER)


def test_standard_input_is_a_file_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(b"from a pipe")))
    assert parse_inputs(["@-"], ONE_TEXT) == {"text": b"from a pipe"}


def strings(*items: bytes) -> Any:
    array = np.empty(len(items), object)
    array[:] = items
    return array


def test_json_keeps_text_as_text_and_bytes_as_base64() -> None:
    outputs = {"s": strings("grün".encode(), b"\xff"), "f": np.array([[1.5]], np.float32), "b": np.array([True])}
    shown = as_json(outputs)
    assert orjson.loads(shown) == {"s": ["grün", {"base64": "/w=="}], "f": [[1.5]], "b": [True]}


def test_text_shows_small_things_whole_and_large_ones_cut() -> None:
    assert as_text({"label": strings(b"png")}) == 'label  BYTES [1]  "png"'
    assert as_text({"score": np.array([0.5])}) == "score  FP64 [1]  0.5"
    large = np.arange(10_000, dtype=np.float32).reshape(1, -1)
    assert len(as_text({"x": large})) < 200
    assert "9.999e+03" in as_text({"x": large}, full=True)
    assert as_text({"s": strings(b"a" * 1000)}).endswith("… (1000 bytes)")


def test_raw_is_the_bytes_of_one_output() -> None:
    assert as_raw({"s": strings(b"\x00", b"\x01")}) == b"\x00\x01"
    assert as_raw({"x": np.array([1], "<i4")}) == b"\x01\x00\x00\x00"
    with pytest.raises(InvalidArgument, match="choose with --output: a, b"):
        as_raw({"a": strings(), "b": strings()})
