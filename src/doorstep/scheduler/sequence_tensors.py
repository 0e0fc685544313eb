"""The tensors a sequence model gets besides the client's: controls, correlation ids, states. Knows no queue.

The arrays of controls are made once; they are read-only to everybody.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from doorstep.config.model import ModelConfig
from doorstep.config.sequence import SequenceSpec
from doorstep.errors import InvalidArgument, Unsupported
from doorstep.request import InferenceRequest, Outputs
from doorstep.scheduler.sequence_parts import Ticket
from doorstep.types import BYTES, Array, DataType, Tensor, object_array
from doorstep.workers.sample import NOBODY, zeros

LONGEST_ID = 128  # bytes
_INTEGERS = 2**64


class SequenceTensors:
    """Gives requests what their model wants to know of their sequences, and keeps what it says of them."""

    def __init__(self, config: ModelConfig, spec: SequenceSpec) -> None:
        self._name = config.name
        self._shape = (1, 1) if config.max_batch_size > 0 else (1,)
        self._batches = config.max_batch_size > 0
        self._correlation = spec.correlation
        self._states = spec.states
        self._state_of_output = {state.output_name: state.input_name for state in spec.states}
        self._hidden = frozenset(self._state_of_output) - config.outputs.keys()
        self._always_asked = tuple(self._state_of_output)
        self.keeps_states = bool(spec.states)
        self._states_vary = any(-1 in state.dims for state in spec.states)
        # By (start, end): what a request with these flags gets.
        self._controls = {
            (start, end): {
                c.name: self._control(c.name, c.datatype, c.true if on[c.kind] else c.false) for c in spec.controls
            }
            for start in (False, True)
            for end in (False, True)
            for on in ({"START": start, "END": end, "READY": True},)
        }
        self._not_ready = {c.name: self._control(c.name, c.datatype, c.false) for c in spec.controls}

    def _control(self, name: str, datatype: DataType, value: float) -> Tensor:
        return Tensor(name, datatype, np.full(self._shape, value, datatype.numpy))

    def check_id(self, request: InferenceRequest) -> None:
        """Raises InvalidArgument where the correlation id is not of the kind the model wants."""
        value = request.correlation_id
        is_text = type(value) is str
        if is_text and len(str(value).encode()) > LONGEST_ID:
            raise Unsupported(f"string correlation ID cannot be longer than {LONGEST_ID} characters")
        if self._correlation is None:
            return
        name, datatype = self._correlation
        if is_text != (datatype is BYTES):
            got = "BYTES" if is_text else "UINT64"
            raise InvalidArgument(
                f"[request id: {request.id or '<id_unknown>'}] sequence batching control '{name}' data-type is "
                f"'{got}', but model '{self._name}' expects '{datatype}'"
            )

    def give(self, ticket: Ticket) -> None:
        """Adds controls, the correlation id and the states to the request's inputs."""
        request = ticket.request
        inputs = {**request.inputs, **self._controls[request.sequence_start, request.sequence_end]}
        if self._correlation is not None:
            name, datatype = self._correlation
            inputs[name] = Tensor(name, datatype, self._id(request.correlation_id, datatype))
        slot = ticket.slot
        if self._states and slot is not None:
            states = slot.states
            if states is None or request.sequence_start:
                states = slot.states = {s.input_name: Tensor(s.input_name, s.datatype, s.initial) for s in self._states}
            ticket.states = states
            inputs.update(states)
            asked = request.requested_outputs
            if asked:
                request.requested_outputs = (*asked, *(o for o in self._always_asked if o not in asked))
        request.inputs = inputs

    def key(self, ticket: Ticket) -> object:
        """What requests that share a batch have in common: their own shapes, and those of their states."""
        if not self._states_vary or ticket.slot is None:
            return ticket.batch_key
        states = None if ticket.request.sequence_start else ticket.slot.states
        if states is None:
            return ticket.batch_key, tuple(state.initial.shape for state in self._states)
        return ticket.batch_key, tuple(tensor.array.shape for tensor in states.values())

    def padding(self, like: InferenceRequest) -> InferenceRequest:
        """A request with zeros in the shapes of `like`, and every control at its false value."""
        inputs = {
            name: Tensor(name, tensor.datatype, zeros(tensor.datatype, tensor.array.shape))
            for name, tensor in like.inputs.items()
        }
        inputs.update(self._not_ready)
        return InferenceRequest(like.model_name, inputs, NOBODY, model_version=like.model_version)

    def _id(self, value: int | str, datatype: DataType) -> Array:
        if datatype is BYTES:
            return object_array([str(value).encode()], self._shape)
        number = int(value) % _INTEGERS  # narrower types keep the low bits, signed ones read them as theirs
        low = number.to_bytes(8, "little")[: datatype.itemsize]
        return np.frombuffer(low, datatype.numpy).reshape(self._shape)

    def keep(self, ticket: Ticket, outputs: Sequence[Tensor]) -> None:
        """Notes the states among `outputs`. Copies: the arrays are slices of a batch's."""
        states = ticket.states
        if states is None:
            return
        for tensor in outputs:
            name = self._state_of_output.get(tensor.name)
            if name is not None:
                states[name] = Tensor(name, tensor.datatype, tensor.array.copy())

    def without_states(self, outputs: Sequence[Tensor], asked: tuple[str, ...]) -> Sequence[Tensor]:
        """What the client is to see: no states, unless the config lists them as outputs and it asked for them."""
        shown = [t for t in outputs if t.name not in self._hidden and (not asked or t.name in asked)]
        return Outputs(shown, outputs.parameters) if isinstance(outputs, Outputs) else shown
