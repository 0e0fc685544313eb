"""From a `doorstep.Model` class to its config, and both compared. Loads no weights, runs no model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from doorstep.backends.python.hints import SUPPORTED, Hint
from doorstep.backends.python.signature import Signature, read_signature
from doorstep.backends.python.source import Source
from doorstep.errors import ConfigError, Problem
from doorstep.types import BY_CONFIG_NUMBER


def complete_from_hints(proto: Any, source: Source) -> None:
    """Adds what the config leaves out. Raises ConfigError with everything the class and the config disagree on."""
    where = _where(source)
    signature, texts = read_signature(source.model, source.module)
    problems = [Problem(where, text) for text in texts]
    if not problems:
        _complete_batching(proto, source, where, problems)
        batched = proto.max_batch_size > 0
        _complete_inputs(proto, signature, batched, where, problems)
        _complete_outputs(proto, signature, batched, where, problems)
        _complete_policy(proto, signature, where, problems)
    if problems:
        raise ConfigError(proto.name, problems)


def _complete_policy(proto: Any, signature: Signature, where: str, problems: list[Problem]) -> None:
    """A model that yields is decoupled, and no other."""
    written = proto.HasField("model_transaction_policy")
    if signature.streams and written and not proto.model_transaction_policy.decoupled:
        what = "predict yields, but config.pbtxt says model_transaction_policy { decoupled: false }"
        problems.append(Problem(where, what, "take that out, or return one value"))
    elif signature.streams:
        proto.model_transaction_policy.decoupled = True
    elif proto.model_transaction_policy.decoupled:
        what = "config.pbtxt says model_transaction_policy { decoupled: true }, but predict returns one value"
        problems.append(Problem(where, what, "write `yield`, and -> Iterator[…]"))


def _where(source: Source) -> str:
    predict = getattr(source.model, "predict", None)
    try:
        _, line = inspect.getsourcelines(predict or source.model)
    except (OSError, TypeError):
        return str(source.path)
    return f"{source.path}:{line}"


def _complete_batching(proto: Any, source: Source, where: str, problems: list[Problem]) -> None:
    own = source.model.max_batch_size
    if type(own) is not int or own < 0:
        problems.append(Problem(where, f"max_batch_size is {own!r}", "write a whole number, 0 for no batching"))
        return
    if not proto.max_batch_size:
        proto.max_batch_size = own
    if proto.max_batch_size > 1 and proto.WhichOneof("scheduling_choice") is None:
        proto.dynamic_batching.SetInParent()


def _complete_inputs(proto: Any, signature: Signature, batched: bool, where: str, problems: list[Problem]) -> None:
    written = {tensor.name: tensor for tensor in proto.input}
    problems += (
        Problem(where, f"config.pbtxt has input '{name}', but predict has no such argument", "rename one of them")
        for name in written
        if name not in signature.inputs
    )
    for name, hint in signature.inputs.items():
        tensor = written.get(name)
        if tensor is None and name in signature.optional and hint is None:
            continue  # an argument with a default and no hint is the author's own business
        if hint is None:
            if tensor is None or not tensor.data_type or not tensor.dims:
                problems.append(Problem(where, f"argument '{name}' of predict has no type hint", f"write {SUPPORTED}"))
            continue
        if tensor is None:
            tensor = proto.input.add(name=name)
            tensor.optional = name in signature.optional
        elif tensor.optional and name not in signature.optional:
            problems.append(
                Problem(where, f"input '{name}' is optional in config.pbtxt", f"give argument '{name}' a default value")
            )
        texts = _complete_tensor(tensor, hint, f"argument '{name}' of predict", batched=batched)
        problems += (Problem(where, *text) for text in texts)


def _complete_outputs(proto: Any, signature: Signature, batched: bool, where: str, problems: list[Problem]) -> None:
    written = {tensor.name: tensor for tensor in proto.output}
    hints: Mapping[str, Hint] = signature.outputs or {}
    if signature.outputs is None:
        if not written:
            problems.append(
                Problem(where, "nothing says what predict returns", "write `-> list[str]` or whatever it returns")
            )
        return
    names = ", ".join(map(repr, hints)) or "nothing"
    problems += (
        Problem(where, f"config.pbtxt has output '{name}', but predict returns {names}", "use the same names in both")
        for name in written
        if name not in hints
    )
    for name, hint in hints.items():
        tensor = written.get(name)
        if tensor is None:
            tensor = proto.output.add(name=name)
        texts = _complete_tensor(tensor, hint, f"output '{name}'", batched=batched)
        problems += (Problem(where, *text) for text in texts)


def _complete_tensor(tensor: Any, hint: Hint, what: str, *, batched: bool) -> list[tuple[str, str]]:
    """Gives what is wrong, each with what to do."""
    if batched and hint.form == "scalar":
        wrong = f"{what} is {hint.text}, but with max_batch_size it holds one value for each row"
        return [(wrong, f"write list[{hint.text}]")]
    problems = []
    if tensor.data_type:
        datatype = BY_CONFIG_NUMBER[tensor.data_type]
        if not hint.fits(datatype):
            problems.append((f"{what} is {hint.text}, but config.pbtxt says {datatype.config_name}", "make them agree"))
    elif hint.datatype is None:
        problems.append((f"{what} is {hint.text}, which says no datatype", "write npt.NDArray[np.float32], say"))
    else:
        tensor.data_type = hint.datatype.config_number
    if not tensor.dims:
        tensor.dims.extend(hint.dims(batched=batched))
    return problems
