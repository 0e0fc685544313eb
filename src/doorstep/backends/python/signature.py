"""The inputs and outputs that a `doorstep.Model` class declares by its hints. Knows no config and no tensor."""

from __future__ import annotations

import collections.abc
import dataclasses
import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from doorstep.backends.python.hints import Hint, HintError, parse_hint, resolve

OUTPUT = "output"  # the name of an output that has none


@dataclass(frozen=True, slots=True)
class Signature:
    inputs: Mapping[str, Hint | None]  # None: no type hint; the config must say
    optional: frozenset[str]  # inputs that may be missing
    outputs: Mapping[str, Hint] | None  # None: nothing is said; the config must
    unpack: Callable[[Any], Mapping[str, Any]]  # what `predict` returned, or yielded → output name → value
    streams: bool = False  # it yields: any number of responses to a request


def read_signature(model: type[Any], module: ModuleType) -> tuple[Signature, list[str]]:
    """What the class declares, and what is wrong with it, in words."""
    problems: list[str] = []
    predict = getattr(model, "predict", None)
    if not callable(predict):
        return Signature({}, frozenset(), None, _named), [
            f"class {model.__name__} has no method `predict`; write `def predict(self, text: list[str]) -> list[str]:`"
        ]
    try:
        annotations = resolve(predict, module)
    except HintError as error:
        problems.append(str(error))
        annotations = {}
    inputs: dict[str, Hint | None] = {}
    optional = set()
    arguments = list(inspect.signature(predict).parameters.values())
    static = isinstance(inspect.getattr_static(model, "predict"), staticmethod)
    if not arguments or (arguments[0].name != "self" and (static or arguments[0].name in annotations)):
        problems.append("predict lacks `self`; write `def predict(self, …)`")
    for argument in arguments[1:]:
        if argument.kind in (argument.VAR_POSITIONAL, argument.VAR_KEYWORD, argument.POSITIONAL_ONLY):
            problems.append(f"argument '{argument}' of predict cannot be an input; give every input a name of its own")
            continue
        hint = None
        if argument.name in annotations:
            try:
                hint = parse_hint(annotations[argument.name])
            except HintError as error:
                problems.append(f"argument '{argument.name}' of predict: {error}")
        inputs[argument.name] = hint
        if argument.default is not argument.empty:
            optional.add(argument.name)
        elif hint is not None and hint.optional:
            problems.append(f"argument '{argument.name}' of predict may be None but has no default; write ` = None`")
    streams, annotations = _streams(predict, annotations)
    try:
        outputs, unpack = _outputs(model, module, annotations)
    except HintError as error:
        problems.append(str(error))
        outputs, unpack = None, _named
    return Signature(inputs, frozenset(optional), outputs, unpack, streams), problems


_STREAMS = {
    collections.abc.Iterator,
    collections.abc.Iterable,
    collections.abc.Generator,
    collections.abc.AsyncIterator,
    collections.abc.AsyncIterable,
    collections.abc.AsyncGenerator,
}


def _streams(predict: Any, annotations: dict[str, Any]) -> tuple[bool, dict[str, Any]]:
    """Whether `predict` yields, and the annotations with what it yields as what it returns."""
    yields = inspect.isgeneratorfunction(predict) or inspect.isasyncgenfunction(predict)
    returned = annotations.get("return")
    origin = typing.get_origin(returned) or returned
    if isinstance(origin, type) and origin in _STREAMS:
        one = (*typing.get_args(returned), None)[0]
        return True, {**annotations, "return": one}
    return yields, annotations


def _outputs(
    model: type[Any], module: ModuleType, annotations: Mapping[str, Any]
) -> tuple[dict[str, Hint] | None, Callable[[Any], Mapping[str, Any]]]:
    declared = getattr(model, "outputs", None)
    if declared is not None:
        return _hints(declared), _named
    returned = annotations.get("return")
    if returned is None or returned is type(None):
        return None, _named_or_single
    if typing.is_typeddict(returned):
        return _hints(typing.get_type_hints(returned, include_extras=True)), _named
    if dataclasses.is_dataclass(returned):
        names = [field.name for field in dataclasses.fields(returned)]
        return _hints(resolve(returned, module)), lambda value: {name: getattr(value, name) for name in names}
    if isinstance(returned, type) and issubclass(returned, tuple) and hasattr(returned, "_fields"):
        return _hints(resolve(returned, module)), lambda value: value._asdict()
    if typing.get_origin(returned) is dict or returned is dict:
        return None, _named
    try:
        return {OUTPUT: parse_hint(returned)}, _single
    except HintError as error:
        raise HintError(
            f"what predict returns: {error}; for several outputs a TypedDict, a NamedTuple or a dataclass, or a dict "
            "and the class attribute `outputs`"
        ) from None


def _hints(declared: Mapping[str, Any]) -> dict[str, Hint]:
    hints = {}
    for name, annotation in declared.items():
        try:
            hints[name] = parse_hint(annotation)
        except HintError as error:
            raise HintError(f"output '{name}': {error}") from None
    return hints


def _single(value: Any) -> Mapping[str, Any]:
    return {OUTPUT: value}


def _named(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise TypeError(f"predict must return a dict of its outputs, but returned a {type(value).__name__}")
    return value


def _named_or_single(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {OUTPUT: value}
