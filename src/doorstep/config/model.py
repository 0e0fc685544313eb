"""ModelConfig: a complete, checked config.pbtxt in the form the request's path wants it. Reads no file, no model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from doorstep.config.sequence import SequenceSpec, sequence_spec
from doorstep.types import BY_CONFIG_NUMBER, BYTES, DataType


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output of a model, as the wire sees it."""

    name: str
    datatype: DataType
    dims: tuple[int, ...]  # config's dims: no batch dimension; -1 is any size
    shape: tuple[int, ...]  # what the wire carries: dims with -1 in front where the model batches
    reshape: tuple[int, ...] | None = None  # the shape the backend wants instead of dims; () makes scalars
    optional: bool = False
    ragged: bool = False  # requests with different shapes share a batch (allow_ragged_batch)
    labels: tuple[str, ...] = ()  # outputs only: the lines of label_filename


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """`proto` is the inference.ModelConfig message, complete; the rest is derived from it once, for speed."""

    proto: Any
    name: str
    backend: str
    max_batch_size: int  # 0: the model has no batch dimension
    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]
    required_inputs: frozenset[str]
    output_names: tuple[str, ...] = ()
    has_reshape: bool = False  # some input wants another shape than the wire's
    takes_bytes: bool = False  # some input is BYTES, whose elements are looked at one by one
    decoupled: bool = False
    ragged: bool = False  # its batches are put together, or cut, in the ways of batch_input and batch_output
    parameters: Mapping[str, str] = field(default_factory=dict)
    sequence: SequenceSpec | None = None  # what the backend gets besides the client's inputs

    @property
    def platform(self) -> str:
        """What metadata calls `platform`: the legacy name where there is one, else the backend."""
        return str(self.proto.platform or self.proto.backend)

    @classmethod
    def from_proto(
        cls,
        proto: Any,
        labels: Mapping[str, tuple[str, ...]] | None = None,
        initial_states: Mapping[str, bytes] | None = None,
    ) -> ModelConfig:
        """`proto` must be complete and checked (see complete.py, check.py); `labels` are per output name, initial
        states per name of the state's input."""
        batches = proto.max_batch_size > 0

        def spec(tensor: Any, *, is_input: bool) -> TensorSpec:
            dims = tuple(tensor.dims)
            return TensorSpec(
                name=tensor.name,
                datatype=BY_CONFIG_NUMBER[tensor.data_type],
                dims=dims,
                shape=(-1, *dims) if batches and not tensor.is_shape_tensor else dims,
                reshape=tuple(tensor.reshape.shape) if tensor.HasField("reshape") else None,
                optional=is_input and tensor.optional,
                ragged=is_input and tensor.allow_ragged_batch,
                labels=() if is_input else (labels or {}).get(tensor.name, ()),
            )

        inputs = {t.name: spec(t, is_input=True) for t in proto.input}
        outputs = {t.name: spec(t, is_input=False) for t in proto.output}
        return cls(
            proto=proto,
            name=proto.name,
            backend=proto.backend,
            max_batch_size=proto.max_batch_size,
            inputs=inputs,
            outputs=outputs,
            output_names=tuple(outputs),
            has_reshape=any(s.reshape is not None for s in inputs.values()),
            required_inputs=frozenset(n for n, s in inputs.items() if not s.optional),
            takes_bytes=any(s.datatype is BYTES for s in inputs.values()),
            ragged=any(s.ragged for s in inputs.values()) or bool(proto.batch_input or proto.batch_output),
            decoupled=proto.model_transaction_policy.decoupled,
            parameters={k: v.string_value for k, v in proto.parameters.items()},
            sequence=sequence_spec(proto, initial_states),
        )

    def for_backend(self) -> ModelConfig:
        """The config as the backend is to see it: with the controls and states of sequences among its tensors."""
        sequence = self.sequence
        if sequence is None:
            return self
        lead = (-1,) if self.max_batch_size > 0 else ()
        extra = {c.name: TensorSpec(c.name, c.datatype, (1,), (*lead, 1)) for c in sequence.controls}
        if sequence.correlation is not None:
            name, datatype = sequence.correlation
            extra[name] = TensorSpec(name, datatype, (1,), (*lead, 1))
        outputs = dict(self.outputs)
        for state in sequence.states:
            shape = (*lead, *state.dims)
            extra[state.input_name] = TensorSpec(state.input_name, state.datatype, state.dims, shape)
            outputs.setdefault(state.output_name, TensorSpec(state.output_name, state.datatype, state.dims, shape))
        return replace(
            self,
            inputs={**self.inputs, **extra},
            outputs=outputs,
            output_names=tuple(outputs),
            required_inputs=self.required_inputs | extra.keys(),
            takes_bytes=self.takes_bytes or any(spec.datatype is BYTES for spec in extra.values()),
        )
