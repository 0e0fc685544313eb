"""Another number of instances while a model serves, and instances that share resources, over HTTP and gRPC.

The models are those of test_queue_policies.py: they stop in every batch until the test lets them go on.
"""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import tritonclient.http as triton_http
from test_queue_policies import MODEL, SECONDS, TENSORS, Gated, answers, metric, save, until
from tritonclient.utils import InferenceServerException

from doorstep.testing.server import ServerFailed, ServerProcess

pytestmark = pytest.mark.xdist_group("instance_changes")


@pytest.fixture(params=["http", "grpc"])
def protocol(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def group(count: int, rest: str = "kind: KIND_CPU") -> str:
    return f"instance_group {{ count: {count} {rest} }}"


def load(server: ServerProcess, config: dict[str, Any] | None = None) -> None:
    with triton_http.InferenceServerClient(server.http, network_timeout=SECONDS) as client:
        client.load_model("m", config=None if config is None else json.dumps(config))


def config_of(server: ServerProcess) -> dict[str, Any]:
    with urllib.request.urlopen(server.url("/v2/models/m/config"), timeout=SECONDS) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


def count_of(server: ServerProcess) -> list[int]:
    return [one["count"] for one in config_of(server)["instance_group"]]


def rewrite(models: Path, config: str) -> None:
    """In one step, as whoever edits a repository in use should."""
    new = models / "m" / ".config.new"
    new.write_text(TENSORS + config)
    new.rename(models / "m" / "config.pbtxt")


def test_more_and_fewer_instances_while_requests_run_and_wait(tmp_path: Path, protocol: str) -> None:
    batching = "max_batch_size: 1 dynamic_batching { }"
    save(tmp_path, "m", f"{batching} {group(1)}")
    with ServerProcess(tmp_path, "--model-control-mode=explicit", "--load-model=m") as server:
        gated = Gated(server, "m", protocol, tmp_path)
        first = gated.running()
        rest = gated.queued((1, {}), (2, {}), (3, {}))
        rewrite(tmp_path, f"{batching} {group(3)}")
        load(server)
        assert count_of(server) == [3]
        assert {gated.seen()["instance"], gated.seen()["instance"]} == {"m_0_1", "m_0_2"}, "beside the one at work"
        assert gated.pending() == 1
        config = config_of(server)
        config["instance_group"][0]["count"] = 1
        gated.release(4)
        load(server, config)
        assert answers([first, *rest]) == [0, 10, 20, 30]
        assert count_of(server) == [1]
        gated.seen()
        last = gated.send(5)
        assert gated.seen()["instance"] == "m_0_0"
        gated.release()
        assert answers([last]) == [50]
        assert metric(server, "nv_inference_request_success", model="m", version="1") == 5, "its numbers were kept"
        assert gated.failures("REJECTED") == gated.failures("OTHER") == 0
        assert server.logs().count("successfully loaded 'm' version 1") == 1, "it was never loaded again"
        assert server.logs().count("unloading: m:1") == 0
        gated.close()


def test_polling_follows_a_changed_count_in_place(tmp_path: Path, protocol: str) -> None:
    save(tmp_path, "m", f"max_batch_size: 1 {group(2)}")
    with ServerProcess(tmp_path, "--model-control-mode=poll", "--repository-poll-secs=1") as server:
        gated = Gated(server, "m", protocol, tmp_path)
        rewrite(tmp_path, f"max_batch_size: 1 {group(1)}")
        until(lambda: count_of(server) == [1])
        future = gated.running()
        gated.release()
        assert answers([future]) == [0]
        assert server.logs().count("successfully loaded 'm' version 1") == 1
        gated.close()


def test_any_other_change_loads_the_model_again(tmp_path: Path) -> None:
    save(tmp_path, "m", f"max_batch_size: 1 {group(1)}")
    with ServerProcess(tmp_path, "--model-control-mode=explicit", "--load-model=m") as server:
        rewrite(tmp_path, f"max_batch_size: 2 {group(2)}")
        load(server)
        assert (count_of(server), config_of(server)["max_batch_size"]) == ([2], 2)
        assert server.logs().count("successfully loaded 'm' version 1") == 2
        (tmp_path / "m" / "1" / "model.py").write_text(MODEL + "\n")
        rewrite(tmp_path, f"max_batch_size: 2 {group(1)}")
        load(server)
        until(lambda: server.logs().count("successfully loaded 'm' version 1") == 3)


def test_a_change_that_fails_leaves_everything_as_it_was(tmp_path: Path, protocol: str) -> None:
    save(tmp_path, "m", f"max_batch_size: 1 {group(1)}")
    with ServerProcess(tmp_path, "--model-control-mode=explicit", "--load-model=m") as server:
        gated = Gated(server, "m", protocol, tmp_path)
        rewrite(tmp_path, f"max_batch_size: 1 {group(-1)}")
        with pytest.raises(InferenceServerException, match=r"instance group 0 of model m has count -1|count"):
            load(server)
        assert count_of(server) == [1]
        future = gated.running()
        gated.release()
        assert answers([future]) == [0]
        gated.close()


# The rate limiter


def resource(name: str, count: int, rest: str = "") -> str:
    return f"rate_limiter {{ resources {{ name: '{name}' count: {count} {rest} }} }} kind: KIND_CPU"


@pytest.mark.parametrize("batching", ["", "dynamic_batching { }"])
def test_instances_of_several_models_share_a_resource(tmp_path: Path, protocol: str, batching: str) -> None:
    for name in "mn":
        save(tmp_path, name, f"max_batch_size: 1 {batching} {group(2, resource('R', 1, 'global: true'))}")
    with ServerProcess(tmp_path, "--rate-limit=execution_count", "--rate-limit-resource=R:2") as server:
        m, n = (Gated(server, name, protocol, tmp_path) for name in "mn")
        first = m.running()
        second = n.send(1)
        assert n.seen()["x"] == [1]
        third = m.queued((2, {}))
        fourth = n.queued((3, {}))
        assert m.is_quiet()
        assert n.is_quiet()
        m.release()
        assert answers([first]) == [0]
        [waiting] = [g for g in (m, n) if _runs(g, m, n)]
        m.release(2), n.release(2)
        assert sorted(answers([second, *third, *fourth])) == [10, 20, 30]
        assert waiting.pending() == 0
        m.close(), n.close()


def _runs(gated: Gated, *all_of_them: Gated) -> bool:
    until(lambda: not all(g.is_quiet() for g in all_of_them))
    return not gated.is_quiet()


def test_off_the_limits_of_a_config_mean_nothing(tmp_path: Path, protocol: str) -> None:
    save(tmp_path, "m", f"max_batch_size: 1 {group(2, resource('R', 1))}")
    with ServerProcess(tmp_path, "--rate-limit-resource=other:1") as server:
        m = Gated(server, "m", protocol, tmp_path)
        futures = [m.running(), m.send(1)]
        assert m.seen()["x"] == [1]
        m.release(2)
        assert answers(futures) == [0, 10]
        m.close()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--rate-limit-resource=R:2"], 'Resource count for "R" is limited to 2 which will prevent scheduling'),
        (["--rate-limit-resource=S:9"], "the minimum required count is 3"),
        (["--rate-limit-resource=R:9:1"], 'Resource count for "R" is limited to 0'),
    ],
)
def test_a_model_whose_instances_could_never_run_does_not_load(tmp_path: Path, options: list[str], text: str) -> None:
    save(tmp_path, "m", f"max_batch_size: 1 {group(1, resource('R', 3))}")
    with pytest.raises(ServerFailed) as caught, ServerProcess(tmp_path, "--rate-limit=execution_count", *options):
        pass
    assert "failed to load 'm' version 1: Invalid argument: " in str(caught.value)
    assert text in str(caught.value)


def test_an_instance_of_priority_three_has_a_third_of_the_turns(tmp_path: Path, protocol: str) -> None:
    for name, priority in (("often", 1), ("seldom", 3)):
        limits = f"rate_limiter {{ resources {{ name: 'R' count: 1 }} priority: {priority} }} kind: KIND_CPU"
        save(tmp_path, name, f"max_batch_size: 1 {group(1, limits)}")
    with ServerProcess(tmp_path, "--rate-limit=execution_count") as server:
        often, seldom = (Gated(server, name, protocol, tmp_path) for name in ("often", "seldom"))
        first = often.running()
        futures = seldom.queued(*((value, {}) for value in range(3)))
        futures += often.queued(*((value, {}) for value in range(3, 8)))
        at_work, turns = often, ""
        while len(turns) < len(futures):
            at_work.release()
            at_work = often if _runs(often, often, seldom) else seldom
            at_work.seen()
            turns += at_work.name[0]
        at_work.release()
        assert answers([first, *futures]) == [0, *range(0, 80, 10)]
        assert turns[:7].count("s") == 2, f"two of seven, where both wait: {turns}"
        often.close(), seldom.close()
