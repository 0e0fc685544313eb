"""--host-policy: an instance's threads, or its process, run on the cores that its group's policy names."""

from __future__ import annotations

import json
import os
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from doorstep.config.host_policy import HostPolicy, parse_host_policy
from doorstep.config.options import OptionError, parse_options
from doorstep.errors import BackendError, InvalidArgument
from doorstep.testing.server import ServerFailed, ServerProcess
from doorstep.workers.host_policy import pinned

CORES = sorted(os.sched_getaffinity(0))
WHERE = """
import os
import doorstep
class Model(doorstep.Model):
    def load(self) -> None:
        self.loaded_on = sorted(os.sched_getaffinity(0))
    def predict(self, anything: list[int]) -> list[int]:
        return [*self.loaded_on, -1, *sorted(os.sched_getaffinity(0))]
"""


@pytest.mark.skipif(len(CORES) < 2, reason="needs two cores to choose from")
@pytest.mark.parametrize("execution", ["process", "thread"])
@pytest.mark.parametrize("policy", ["mine", ""])
def test_an_instance_loads_and_runs_on_its_policys_cores(tmp_path: Path, execution: str, policy: str) -> None:
    core = CORES[-1]
    folder = tmp_path / "where" / "1"
    folder.mkdir(parents=True)
    (folder / "model.py").write_text(WHERE)
    (tmp_path / "where" / "config.pbtxt").write_text(
        f'parameters {{ key: "execution" value {{ string_value: "{execution}" }} }}\n'
        f'instance_group {{ count: 1 kind: KIND_CPU host_policy: "{policy}" }}'
    )
    with ServerProcess(tmp_path, f"--host-policy={policy or 'cpu'},cpu-cores={core}-{core}") as server:
        assert answer_of(server) == [core, -1, core]
        assert sorted(os.sched_getaffinity(server.pid)) == CORES  # the server itself is where it was


def answer_of(server: ServerProcess) -> Any:
    body = {"inputs": [{"name": "anything", "shape": [1], "datatype": "INT64", "data": [1]}]}
    request = urllib.request.Request(server.url("/v2/models/where/infer"), json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)["outputs"][0]["data"]


def test_a_core_that_is_not_there_fails_the_load(tmp_path: Path) -> None:
    folder = tmp_path / "where" / "1"
    folder.mkdir(parents=True)
    (folder / "model.py").write_text(WHERE)
    with (
        pytest.raises(ServerFailed, match=r"the host policy \(cpu-cores 4000\) cannot be applied"),
        ServerProcess(tmp_path, "--host-policy=cpu,cpu-cores=4000-4000"),
    ):
        pass


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"cpu-cores": "0-3"}, HostPolicy(frozenset({0, 1, 2, 3}))),
        ({"cpu-cores": "0-1,6-6"}, HostPolicy(frozenset({0, 1, 6}))),
        ({"numa-node": "1"}, HostPolicy(frozenset(), 1)),
        ({"cpu-cores": "2-2", "numa-node": "0"}, HostPolicy(frozenset({2}), 0)),
    ],
)
def test_settings_become_a_policy(settings: dict[str, str], expected: HostPolicy) -> None:
    assert parse_host_policy(settings) == expected


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"cpu-cores": "3"}, "host policy setting 'cpu-cores' format is"),
        ({"cpu-cores": "a-b"}, "host policy setting 'cpu-cores': expected a whole number, got 'a'"),
        ({"numa-node": "-1"}, "host policy setting 'numa-node': expected a whole number, got '-1'"),
        ({"numa-node": "64"}, "there are at most 64 nodes"),
    ],
)
def test_a_wrong_setting_is_named(settings: dict[str, str], text: str) -> None:
    with pytest.raises(InvalidArgument, match=text):
        parse_host_policy(settings)


@pytest.mark.parametrize("option", ["x", "x,y", "cpu-cores=1-2", "a,colour=red", "a,cpu-cores=1"])
def test_a_wrong_option_does_not_start_the_server(option: str) -> None:
    with pytest.raises(OptionError, match="host-policy"):
        parse_options(["models", f"--host-policy={option}"])


def test_a_thread_is_where_it_was_afterwards_also_after_an_error() -> None:
    before = os.sched_getaffinity(0)
    with pinned(HostPolicy(frozenset({CORES[0]}))):
        assert os.sched_getaffinity(0) == {CORES[0]}
    assert os.sched_getaffinity(0) == before
    with pytest.raises(BackendError), pinned(HostPolicy(frozenset({4000}))):
        pass
    assert os.sched_getaffinity(0) == before
