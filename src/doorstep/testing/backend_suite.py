"""The conformance kit for backends: what every model of every library must do, run against yours.

Subclass `BackendSuite` in a test file, say which backend and which models, and run pytest:

    class TestNpz(BackendSuite):
        backend = NpzBackend

        def cases(self) -> list[Case]:
            return [Case("line", write_line, {"x": ...}, {"y": ...})]

Every test is a rule that the server relies on; its docstring says which, and what goes wrong for users where it is
broken. Knows no library.
"""

from __future__ import annotations

import gc
import os
import threading
import weakref
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from doorstep import proto
from doorstep.backends.base import Backend, CompletionContext, InstanceContext, ModelInstance
from doorstep.backends.table import GROUP, backend_names, find_backend
from doorstep.client import Client
from doorstep.config.load import load_config
from doorstep.config.model import ModelConfig
from doorstep.config.prepare import prepare_config
from doorstep.errors import DoorstepError
from doorstep.repository.base import VersionSpec
from doorstep.request import LATER, Batch, InferenceRequest
from doorstep.testing.responses import NOBODY, Emitted
from doorstep.testing.server import ServerProcess
from doorstep.types import BYTES, Array, Tensor

MIB = 1 << 20
LOADS = 20
GROWTH = 32 * MIB  # of the process over LOADS loads and unloads


@dataclass
class Case:
    """One model, one request, and what it must answer."""

    name: str
    write: Callable[[Path], object]  # writes the model's files into the folder of its version
    inputs: Mapping[str, Array]  # with the batch dimension, where the model batches; BYTES as arrays of `bytes`
    outputs: Mapping[str, Array] | Sequence[Mapping[str, Array]]  # several where the model is decoupled
    config: str = ""  # config.pbtxt; nothing where your backend completes it
    failing: Mapping[str, Array] | None = None  # inputs of the right names and shapes that the model cannot compute
    tolerance: float = 1e-5
    parameters: dict[str, Any] = field(default_factory=dict)  # the request's

    @property
    def responses(self) -> list[Mapping[str, Array]]:
        return [self.outputs] if isinstance(self.outputs, Mapping) else list(self.outputs)


class BackendSuite:
    """See the module. pytest collects the tests of your subclass, one of each for every case."""

    backend: type[Backend]
    backend_config: Mapping[str, str] = {}  # as --backend-config gives them
    executions: Sequence[str] = ("inline", "thread", "process")  # where its instances may run

    @abstractmethod
    def cases(self) -> list[Case]:
        """At least one model; better one for each kind of datatype and shape that your library has."""

    def broken(self) -> Mapping[str, Callable[[Path], object]]:
        """Files that are no model, by a name for the test: a truncated file, another library's …"""
        return {}

    def pytest_generate_tests(self, metafunc: Any) -> None:
        if "case" in metafunc.fixturenames:
            metafunc.parametrize("case", self.cases(), ids=lambda case: case.name)
        if "broken_name" in metafunc.fixturenames:
            metafunc.parametrize("broken_name", list(self.broken()))
        if "execution" in metafunc.fixturenames:
            metafunc.parametrize("execution", self.executions)

    # Found, completed, refused

    def test_is_found_by_its_name(self) -> None:
        """A config says `backend: "<name>"`; the server, and each worker process, looks for that name."""
        name = self.backend.name
        assert name, f"{self.backend.__name__}.name is empty"
        assert name in backend_names(), (
            f"no installed package has an entry point '{name}' in the group '{GROUP}': add it to pyproject.toml, and "
            "install the package again"
        )
        assert type(find_backend(name)) is self.backend

    def test_completes_the_config_and_changes_nothing_written(self, case: Case, tmp_path: Path) -> None:
        """`doorstep check`, metadata and validation read the completed config; what the user wrote stays."""
        config = self._config(case, tmp_path)
        written = load_config(tmp_path / case.name)
        assert config.inputs.keys() >= case.inputs.keys(), f"inputs of the config: {list(config.inputs)}"
        for tensor in (*written.input, *written.output):
            kept = [t for t in (*config.proto.input, *config.proto.output) if t.name == tensor.name]
            assert kept, f"'{tensor.name}' of config.pbtxt is gone"
            assert list(kept[0].dims) == list(tensor.dims)
            assert kept[0].data_type == tensor.data_type
        again = proto.ModelConfig()
        again.CopyFrom(config.proto)
        self.backend().complete_config(again, tmp_path / case.name, tmp_path / case.name / "1", self._completion())
        assert again == config.proto, "completing a complete config changed it"

    def test_a_broken_model_is_refused_with_a_reason(self, broken_name: str, tmp_path: Path) -> None:
        """It ends as one line in the log and a row of the index; it must be an exception, and say something."""
        folder = tmp_path / "broken" / "1"
        folder.mkdir(parents=True)
        self.broken()[broken_name](folder)
        case = self.cases()[0]
        (tmp_path / "broken" / "config.pbtxt").write_text(f'backend: "{self.backend.name}"\n' + case.config)
        try:
            config = self._prepare("broken", tmp_path)
            self.backend().load_instance(self._context(config, tmp_path, "broken"))
        except Exception as raised:
            said = str(raised)
        else:
            raise AssertionError("it was loaded")
        assert said, "the error has no text"

    # Answers

    def test_answers(self, case: Case, tmp_path: Path) -> None:
        """One request, alone."""
        with self._instance(case, tmp_path) as loaded:
            loaded.assert_answers(case)

    def test_answers_the_same_again_and_again(self, case: Case, tmp_path: Path) -> None:
        """No state is left from one request to the next."""
        with self._instance(case, tmp_path) as loaded:
            for _ in range(5):
                loaded.assert_answers(case)

    def test_a_batch_gives_each_request_its_own(self, case: Case, tmp_path: Path) -> None:
        """Requests run together, where the model batches; each gets what it would have got alone."""
        with self._instance(case, tmp_path) as loaded:
            rows = loaded.rows(case)
            most = loaded.config.max_batch_size
            count = min(most // rows, 4) if most else 1
            batch = loaded.run([loaded.request(case) for _ in range(max(count, 1))])
            for i in range(len(batch.requests)):
                loaded.assert_result(case, batch, i)

    def test_only_some_outputs_may_be_asked_for(self, case: Case, tmp_path: Path) -> None:
        """A result may leave out what was not asked for, but not what was."""
        with self._instance(case, tmp_path) as loaded:
            for name in case.responses[0]:
                request = loaded.request(case)
                request.requested_outputs = (name,)
                batch = loaded.run([request])
                loaded.assert_result(case, batch, 0, only=name)

    def test_inputs_are_left_as_they_are(self, case: Case, tmp_path: Path) -> None:
        """They are views of what came over the wire, read-only, and may be shared with other models."""
        with self._instance(case, tmp_path) as loaded:
            request = loaded.request(case, read_only=True)
            before = {name: tensor.array.copy() for name, tensor in request.inputs.items()}
            loaded.run([request])
            for name, tensor in request.inputs.items():
                assert np.array_equal(before[name], tensor.array), f"input '{name}' was changed"

    def test_outputs_stay_as_they_are(self, case: Case, tmp_path: Path) -> None:
        """An answer may still be on its way to a slow client while the next batch runs: no buffer is used again."""
        with self._instance(case, tmp_path) as loaded:
            first = loaded.run([loaded.request(case)])
            others = {n: _other(np.asarray(a)) for n, a in case.inputs.items()}
            try:
                loaded.run([loaded.request(case, inputs=others)])
            except Exception:  # noqa: S110 (other values need not be ones the model takes)
                pass
            loaded.assert_result(case, first, 0)

    def test_a_request_that_fails_leaves_the_instance_working(self, case: Case, tmp_path: Path) -> None:
        """What the library raises becomes the error of that batch's requests, and the next ones are answered."""
        if case.failing is None:
            return
        with self._instance(case, tmp_path) as loaded:
            failed = loaded.run([loaded.request(case, inputs=case.failing)], may_raise=True)
            assert isinstance(failed.results[0], DoorstepError) or loaded.emitted.error, "it was answered"
            loaded.assert_answers(case)

    # Life

    def test_copies_are_independent(self, case: Case, tmp_path: Path) -> None:
        """Instances of a group are loaded and unloaded one by one, when their number changes."""
        with self._instance(case, tmp_path) as kept:
            with self._instance(case, tmp_path) as other:
                other.assert_answers(case)
            kept.assert_answers(case)

    def test_copies_run_at_the_same_time(self, case: Case, tmp_path: Path) -> None:
        """Each instance has a thread; several run in the library at once."""
        failures: list[BaseException] = []
        copies = [self._instance(case, tmp_path) for _ in range(3)]

        def work(loaded: Loaded) -> None:
            try:
                for _ in range(20):
                    loaded.assert_answers(case)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(loaded,)) for loaded in copies]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for loaded in copies:
            loaded.instance.unload()
        if failures:
            raise failures[0]

    def test_unloading_gives_back_the_instance(self, case: Case, tmp_path: Path) -> None:
        """An unloaded model that something still holds is memory that never comes back."""
        loaded = self._instance(case, tmp_path)
        loaded.assert_answers(case)
        loaded.instance.unload()
        instance = weakref.ref(loaded.instance)
        del loaded
        gc.collect()
        assert instance() is None, "something still holds the instance: a cache, a thread, a ring of references"

    def test_loading_again_and_again_does_not_grow(self, case: Case, tmp_path: Path) -> None:
        """A server that is updated for months must not need a restart."""

        def once() -> None:
            with self._instance(case, tmp_path) as loaded:
                loaded.assert_answers(case)

        for _ in range(3):
            once()
        gc.collect()
        before = _resident_bytes()
        for _ in range(LOADS):
            once()
        gc.collect()
        grown = _resident_bytes() - before
        assert grown < GROWTH, f"{LOADS} loads and unloads took {grown / MIB:.0f} MiB"

    # In a server

    def test_serves(self, case: Case, execution: str, tmp_path: Path) -> None:
        """The whole way: a repository, `doorstep serve`, a client; inline, in a thread, and in a process of its own."""
        config = self._config(case, tmp_path)
        if config.decoupled:
            return  # its responses need a stream
        path = tmp_path / case.name / "config.pbtxt"
        path.write_text(
            path.read_text() + f'\nparameters {{ key: "execution" value {{ string_value: "{execution}" }} }}\n'
        )
        settings = [f"--backend-config={self.backend.name},{k}={v}" for k, v in self.backend_config.items()]
        with ServerProcess(tmp_path, *settings) as server, Client(server.url("")) as client:
            found = client.infer_all(
                case.name, dict(case.inputs), requested=list(case.responses[0]), parameters=case.parameters or None
            )
            for name, expected in case.responses[0].items():
                _assert_equal(name, expected, found[name], case.tolerance)

    # What the tests are made of

    def _completion(self) -> CompletionContext:
        return CompletionContext(dict(self.backend_config))

    def _config(self, case: Case, folder: Path) -> ModelConfig:
        version = folder / case.name / "1"
        if not version.exists():
            version.mkdir(parents=True)
            case.write(version)
            text = case.config if "backend:" in case.config else f'backend: "{self.backend.name}"\n{case.config}'
            (folder / case.name / "config.pbtxt").write_text(text)
        return self._prepare(case.name, folder)

    def _prepare(self, name: str, folder: Path) -> ModelConfig:
        directory = folder / name
        spec = VersionSpec(name, "1", directory, directory / "1", load_config(directory))
        return prepare_config(
            spec,
            lambda message: self.backend().complete_config(message, directory, directory / "1", self._completion()),
            backends=[self.backend.name],
        )

    def _context(self, config: ModelConfig, folder: Path, name: str) -> InstanceContext:
        return InstanceContext(
            config=config,
            version="1",
            model_directory=folder / name,
            version_directory=folder / name / "1",
            instance_name=f"{name}_0",
            threads=1,
            backend_config=self.backend_config,
        )

    def _instance(self, case: Case, folder: Path) -> Loaded:
        config = self._config(case, folder)
        return Loaded(config, self.backend().load_instance(self._context(config, folder, case.name)))


class Loaded:
    """An instance under test. A context manager: leaving unloads it."""

    def __init__(self, config: ModelConfig, instance: ModelInstance) -> None:
        assert isinstance(instance, ModelInstance), f"load_instance gave a {type(instance).__name__}"
        self.config = config
        self.instance = instance
        self.emitted = Emitted()

    def __enter__(self) -> Loaded:
        return self

    def __exit__(self, *_: object) -> None:
        self.instance.unload()

    def rows(self, case: Case) -> int:
        return int(next(iter(case.inputs.values())).shape[0]) if self.config.max_batch_size else 1

    def request(
        self, case: Case, *, inputs: Mapping[str, Array] | None = None, read_only: bool = False
    ) -> InferenceRequest:
        tensors = {}
        for name, array in (case.inputs if inputs is None else inputs).items():
            spec = self.config.inputs[name]
            array = np.array(array, dtype=np.object_ if spec.datatype is BYTES else spec.datatype.numpy)
            array.setflags(write=not read_only)
            tensors[name] = Tensor(name, spec.datatype, array)
        request = InferenceRequest(self.config.name, tensors, NOBODY, parameters=dict(case.parameters) or None)
        request.rows = self.rows(case)
        return request

    def run(self, requests: list[InferenceRequest], *, may_raise: bool = False) -> Batch:
        batch = Batch(requests, sum(request.rows for request in requests))
        self.emitted = Emitted()
        batch.emit = self.emitted.emit
        try:
            self.instance.execute(batch)
        except Exception as error:
            if not may_raise:
                raise
            batch.fail(error if isinstance(error, DoorstepError) else DoorstepError(str(error)))
        self.emitted.wait(sum(result is LATER for result in batch.results))
        return batch

    def assert_answers(self, case: Case) -> None:
        self.assert_result(case, self.run([self.request(case)]), 0)

    def assert_result(self, case: Case, batch: Batch, i: int, *, only: str = "") -> None:
        result = batch.results[i]
        assert result is not None, f"request {i} of the batch has neither outputs nor an error"
        if isinstance(result, DoorstepError):
            raise AssertionError(f"request {i} failed: {result.message}") from result
        found = self.emitted.responses_to(batch.requests[i]) if result is LATER else [result]
        assert len(found) == len(case.responses), f"{len(found)} responses, not {len(case.responses)}"
        for tensors, expected in zip(found, case.responses, strict=True):
            by_name = {tensor.name: tensor for tensor in tensors}  # type: ignore[union-attr]
            assert len(by_name) == len(list(tensors)), "an output comes twice"  # type: ignore[arg-type]
            for name in [only] if only else expected:
                assert name in by_name, f"output '{name}' is missing; there are {list(by_name)}"
                spec = self.config.outputs[name]
                assert by_name[name].datatype is spec.datatype, f"output '{name}' is {by_name[name].datatype}"
                _assert_equal(name, expected[name], by_name[name].array, case.tolerance)


def _assert_equal(name: str, expected: Array, found: Array, tolerance: float) -> None:
    expected = np.asarray(expected)
    assert found.shape == expected.shape, f"output '{name}' has shape {list(found.shape)}, not {list(expected.shape)}"
    if expected.dtype.kind in "OSU":
        as_bytes = [v if isinstance(v, bytes) else str(v).encode() for v in expected.ravel().tolist()]
        assert [v if isinstance(v, bytes) else str(v).encode() for v in found.ravel().tolist()] == as_bytes, name
    elif expected.dtype.kind in "fcV":  # V: bfloat16
        np.testing.assert_allclose(
            found.astype(np.float64), expected.astype(np.float64), rtol=tolerance, atol=tolerance, err_msg=name
        )
    else:
        np.testing.assert_array_equal(found, expected, err_msg=name)


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _other(array: Array) -> Array:
    """Values of the same kind that are not these."""
    if array.dtype.kind in "OSU":
        return np.full(array.shape, b"other", np.object_)
    if array.dtype.kind == "b":
        return ~array
    return (array + 1).astype(array.dtype)
