"""ModelRepository: the three control modes, load and unload calls, polling, the index. Fake models, a real disk."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from doorstep.config.load import parse_json_config
from doorstep.errors import BackendError, DoorstepError, ErrorCode, NotFound
from doorstep.repository.base import IndexEntry, LoadRequest
from doorstep.repository.lifecycle import StateChange
from doorstep.repository.repository import ModelRepository, RepositoryOptions
from doorstep.testing.servables import FakeLoader, FakeServable, read_config, write_version

ALL = "version_policy { all { } }"


class World:
    """A repository over directories, and what its loader did."""

    def __init__(self, *repositories: Path, **options: Any) -> None:
        self.loader = FakeLoader()
        self.changes: list[StateChange] = []
        self.repository: ModelRepository[FakeServable] = ModelRepository(
            RepositoryOptions(repositories, **options), self.loader, read_config, parse_json_config
        )
        self.repository.on_change.append(self.changes.append)
        self.find = self.repository.find

    async def poll(self) -> list[str]:
        """One look at the disk and all that follows from it. Returns what went wrong."""
        tasks = await self.repository.poll()
        return [str(e) for e in await asyncio.gather(*tasks, return_exceptions=True) if e is not None]

    async def settled(self) -> None:
        """Everything that left has been closed."""
        while self.repository._loader._retiring:
            await asyncio.wait(self.repository._loader._retiring)

    def index(self, ready_only: bool = False) -> list[tuple[str, ...]]:
        return [tuple(filter(None, (e.name, e.version, e.state, e.reason))) for e in self.repository.index(ready_only)]


def run(scenario: Callable[[World], Coroutine[Any, Any, None]], *repositories: Path, **options: Any) -> None:
    async def main() -> None:
        world = World(*repositories, **options)
        try:
            await scenario(world)
        finally:
            assert await world.repository.stop(30) == []
        assert all(made.closed.is_set() for made in world.loader.made), "everything loaded has been closed"

    asyncio.run(main())


async def refused(work: Coroutine[Any, Any, None]) -> tuple[ErrorCode, str]:
    with pytest.raises(DoorstepError) as raised:
        await work
    return raised.value.code, raised.value.message


# ---- start


def test_mode_none_loads_everything_at_the_start_and_refuses_load_calls(tmp_path: Path) -> None:
    write_version(tmp_path, "bert", 1)
    write_version(tmp_path, "resnet", 1)
    write_version(tmp_path, "resnet", 3, "third")
    write_version(tmp_path, "vgg", 1, config=ALL)
    write_version(tmp_path, "vgg", 2)

    async def scenario(world: World) -> None:
        report = await world.repository.start()
        assert (report.loaded, report.failures) == (("bert", "resnet", "vgg"), {})
        assert world.find("resnet").content == "third"
        assert world.index() == [
            ("bert", "1", "READY"), ("resnet", "3", "READY"), ("vgg", "1", "READY"), ("vgg", "2", "READY"),
        ]  # fmt: skip
        assert world.repository.all_ready
        text = "explicit model load / unload is not allowed if polling is enabled"
        assert await refused(world.repository.load("bert")) == (ErrorCode.UNAVAILABLE, text)
        assert await refused(world.repository.unload("bert")) == (ErrorCode.UNAVAILABLE, text)

    run(scenario, tmp_path)


def test_explicit_mode_loads_only_what_is_named(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        write_version(tmp_path, name, 1)

    async def scenario(world: World) -> None:
        report = await world.repository.start()
        assert (report.loaded, report.failures) == (
            ("a", "b"),
            {"missing": "failed to load 'missing', failed to poll from model repository"},
        )
        assert world.index() == [("a", "1", "READY"), ("b", "1", "READY"), ("c",)]
        assert world.index(ready_only=True) == [("a", "1", "READY"), ("b", "1", "READY")]

    run(scenario, tmp_path, control="explicit", startup_models=["a", "b", "missing", "a"])


def test_explicit_mode_loads_nothing_unless_told_and_a_star_is_everything(tmp_path: Path) -> None:
    write_version(tmp_path, "a", 1)
    write_version(tmp_path, "b", 1)

    async def nothing(world: World) -> None:
        assert (await world.repository.start()).loaded == ()
        assert world.index() == [("a",), ("b",)]
        assert world.repository.all_ready

    async def everything(world: World) -> None:
        assert (await world.repository.start()).loaded == ("a", "b")

    run(nothing, tmp_path, control="explicit")
    run(everything, tmp_path, control="explicit", startup_models=["*"])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"control": "explicit", "startup_models": ["*", "a"]},
            "Wildcard model name '*' must be the ONLY startup model",
        ),
        ({"control": "none", "startup_models": ["a"]}, "--load-model needs --model-control-mode=explicit"),
        ({"control": "explicit", "startup_models": ["../a"]}, "must not contain path traversal characters"),
    ],
)
def test_options_that_contradict_each_other_stop_the_start(tmp_path: Path, options: Any, text: str) -> None:
    async def scenario(world: World) -> None:
        code, message = await refused(world.repository.start())  # type: ignore[arg-type]
        assert code is ErrorCode.INVALID_ARG
        assert text in message

    run(scenario, tmp_path, **options)


def test_a_repository_that_is_no_directory_stops_the_start(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        _, message = await refused(world.repository.start())  # type: ignore[arg-type]
        assert message == f"repository path '{tmp_path / 'missing'}' is not a valid directory"

    run(scenario, tmp_path, tmp_path / "missing")


def test_failures_at_the_start_are_listed_and_the_rest_serves(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    write_version(a, "good", 1)
    write_version(a, "broken", 1)
    write_version(a, "bad_config", 1, config="max_batch_size: many")
    write_version(a, "misnamed", 1, config='name: "other"')
    write_version(a, "twice", 1)
    write_version(b, "twice", 1)
    (b / "empty").mkdir()

    async def scenario(world: World) -> None:
        world.loader.failures["broken:1"] = lambda: BackendError("no such operator")
        report = await world.repository.start()
        assert report.loaded == ("good",)
        assert report.failures == {
            "broken": "load failed for model 'broken': version 1 is at UNAVAILABLE state: Internal: no such operator;",
            "bad_config": report.failures["bad_config"],
            "misnamed": "unexpected directory name 'misnamed' for model 'other', directory name must equal model name",
            "twice": "failed to poll model 'twice': not unique across all model repositories",
            "empty": "load failed for model 'empty': "
            "at least one version must be available under the version policy of model 'empty'",
        }
        assert "max_batch_size" in report.failures["bad_config"]
        assert world.index()[1:] == [
            ("broken", "1", "UNAVAILABLE", "Internal: no such operator"),
            ("empty", "UNAVAILABLE", report.failures["empty"]),
            ("good", "1", "READY"),
            ("misnamed", "UNAVAILABLE", report.failures["misnamed"]),
            ("twice", "UNAVAILABLE", "model appears in two or more repositories"),
        ]
        assert world.index(ready_only=True) == [("good", "1", "READY")]
        assert not world.repository.all_ready
        for name, version, text in (
            ("empty", "", "'empty' has no available versions"),
            ("empty", "1", "'empty' version 1 is not found"),
            ("twice", "", "'twice' is not found"),
        ):
            with pytest.raises(NotFound) as missed:
                world.repository.find(name, version)
            assert missed.value.message == f"Request for unknown model: {text}"

    run(scenario, a, b)


# ---- load and unload calls


@pytest.mark.parametrize(
    ("name", "code", "text"),
    [
        ("", ErrorCode.INVALID_ARG, "Model name cannot be empty. Please enter a valid name to deploy."),
        (" \t", ErrorCode.INVALID_ARG, "Model name cannot be empty. Please enter a valid name to deploy."),
        *(
            (
                name,
                ErrorCode.INVALID_ARG,
                f"invalid model name '{name}', model name must not contain path traversal characters",
            )
            for name in ("..", ".", " .. ", "../resnet", "a/b", "/etc", "a\\b", "a\0b")
        ),
        ("vgg", ErrorCode.INTERNAL, "failed to load 'vgg', failed to poll from model repository"),
        (".hidden", ErrorCode.INTERNAL, "failed to load '.hidden', failed to poll from model repository"),
    ],
)
def test_a_name_that_is_no_model_is_refused_in_tritons_words(
    tmp_path: Path, name: str, code: ErrorCode, text: str
) -> None:
    write_version(tmp_path, "resnet", 1)
    write_version(tmp_path, ".hidden", 1)

    async def scenario(world: World) -> None:
        assert await refused(world.repository.load(name)) == (code, text)
        assert world.loader.calls == []

    run(scenario, tmp_path, control="explicit")


def test_load_serves_unload_ceases_and_both_may_be_repeated(tmp_path: Path) -> None:
    write_version(tmp_path, "resnet", 1)

    async def scenario(world: World) -> None:
        await world.repository.start()
        await world.repository.load("resnet")
        first = world.find("resnet")
        await world.repository.load("resnet")
        assert world.find("resnet") is first, "nothing changed: nothing is loaded again"
        await world.repository.unload("resnet")
        with pytest.raises(DoorstepError, match="Request for unknown model: 'resnet' has no available versions"):
            world.find("resnet")
        await world.settled()
        assert first.closed.is_set()
        assert world.index() == [("resnet", "1", "UNAVAILABLE", "unloaded")]
        await world.repository.unload("resnet")
        await world.repository.unload("never heard of")
        assert world.repository.all_ready, "what was unloaded on purpose is not missed"
        await world.repository.load("resnet")
        assert world.find("resnet") is not first
        assert world.loader.calls == ["resnet:1", "resnet:1"]

    run(scenario, tmp_path, control="explicit")


def test_load_follows_the_files(tmp_path: Path) -> None:
    write_version(tmp_path, "resnet", 1, "one")

    async def scenario(world: World) -> None:
        await world.repository.load("resnet")
        one = world.find("resnet")
        write_version(tmp_path, "resnet", 2, "two")
        await world.repository.load("resnet")
        assert (world.find("resnet").content, world.repository.versions("resnet")) == ("two", ["2"])
        assert one.stopped
        write_version(tmp_path, "resnet", 2, "two, mended")
        await world.repository.load("resnet")
        assert world.find("resnet").content == "two, mended"
        two = world.find("resnet")
        (tmp_path / "resnet" / "config.pbtxt").write_text(ALL)
        await world.repository.load("resnet")
        assert world.repository.versions("resnet") == ["1", "2"]
        assert world.find("resnet") is not two, "a new config concerns every version"
        both = [world.find("resnet", "1"), world.find("resnet", "2")]
        write_version(tmp_path, "resnet", 1, "one, mended")
        await world.repository.load("resnet")
        assert world.find("resnet", "1") is not both[0]
        assert world.find("resnet", "2") is both[1], "a version that did not change is not loaded again"

    run(scenario, tmp_path, control="explicit")


def test_a_model_that_came_after_the_start_is_in_the_index_after_a_look(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        await world.repository.start()
        write_version(tmp_path, "resnet", 1)
        assert world.index() == []
        await world.repository.refresh()
        assert world.index() == [("resnet",)]

    run(scenario, tmp_path, control="explicit")


def test_versions_that_the_policy_asks_for_but_are_not_there_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_version(tmp_path, "resnet", 1, config="version_policy { specific { versions: [ 1, 4 ] } }")
    write_version(tmp_path, "resnet", "02")

    async def scenario(world: World) -> None:
        await world.repository.load("resnet")
        assert world.repository.versions("resnet") == ["1"]

    run(scenario, tmp_path, control="explicit")
    assert "version 4 is specified for model 'resnet', but the version directory is not present" in caplog.text
    assert "ignore version directory '02' which contains leading zeros in its directory name" in caplog.text


def test_a_load_is_tried_again_as_often_as_told(tmp_path: Path) -> None:
    write_version(tmp_path, "resnet", 1)

    async def scenario(world: World) -> None:
        attempts = iter([BackendError("out of memory"), BackendError("still out of memory")])

        def fail_twice() -> BaseException:
            error = next(attempts, None)
            if error is None:
                world.loader.failures.clear()
                return BackendError("once more")
            return error

        world.loader.failures["resnet:1"] = fail_twice
        await world.repository.load("resnet")
        assert world.loader.calls == ["resnet:1"] * 4
        assert world.index() == [("resnet", "1", "READY")]

    run(scenario, tmp_path, control="explicit", load_retries=3)


def test_versions_that_load_side_by_side_share_no_config(tmp_path: Path) -> None:
    write_version(tmp_path, "resnet", 1, config=ALL)
    write_version(tmp_path, "resnet", 2)

    async def scenario(world: World) -> None:
        await world.repository.load("resnet")
        one, two = (world.find("resnet", v).spec.config for v in "12")
        assert one == two
        assert one is not two, "whoever completes one would change the other"

    run(scenario, tmp_path, control="explicit")


# ---- overrides


def test_a_config_override_is_used_once_and_leaves_the_repository_alone(tmp_path: Path) -> None:
    write_version(tmp_path, "resnet", 1)
    write_version(tmp_path, "resnet", 2)

    async def scenario(world: World) -> None:
        await world.repository.load(
            "resnet", LoadRequest(config='{"version_policy": {"all": {}}, "max_batch_size": 8}')
        )
        assert world.repository.versions("resnet") == ["1", "2"]
        assert world.find("resnet").spec.config.max_batch_size == 8
        before = world.find("resnet")
        await world.repository.load("resnet", LoadRequest(config='{"max_batch_size": 8}'))
        assert world.find("resnet") is not before, "an override always loads again"
        await world.repository.load("resnet")
        assert world.repository.versions("resnet") == ["2"]
        assert world.find("resnet").spec.config.max_batch_size == 0
        assert not (tmp_path / "resnet" / "config.pbtxt").exists()

    run(scenario, tmp_path, control="explicit")


def test_files_of_a_load_call_are_served_until_the_last_user_is_gone(tmp_path: Path) -> None:
    write_version(tmp_path, "resnet", 1, "from the repository")

    async def scenario(world: World) -> None:
        await world.repository.load("resnet")
        request = LoadRequest(
            config='{"version_policy": {"all": {}}}', files={"/3/model": b"three", "./5/model": b"five"}
        )
        await world.repository.load("resnet", request)
        assert world.repository.versions("resnet") == ["3", "5"]
        three = world.find("resnet", "3")
        assert (three.content, world.find("resnet").content) == ("three", "five")
        directory = three.spec.model_directory
        assert directory.name == "resnet"
        assert tmp_path not in directory.parents
        three.begin()
        await world.repository.load("resnet")
        assert world.find("resnet").content == "from the repository"
        assert three.spec.version_directory.exists(), "a request still runs on it"
        three.end()
        await world.settled()
        assert await world.repository.stop(30) == []
        assert not directory.exists()

    run(scenario, tmp_path, control="explicit")


def test_a_model_may_live_from_a_load_calls_files_alone(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        await world.repository.load("new", LoadRequest(config="{}", files={"1/model": b"x"}))
        assert world.index() == [("new", "1", "READY")]
        await world.repository.unload("new")
        await world.settled()
        text = "failed to load 'new', failed to poll from model repository"
        assert await refused(world.repository.load("new")) == (ErrorCode.INTERNAL, text)

    run(scenario, tmp_path, control="explicit")


@pytest.mark.parametrize(
    ("request_", "why"),
    [
        (
            LoadRequest(files={"1/model": b"x"}),
            "Load parameter 'config' must be specified for model file override",
        ),
        (LoadRequest(config="[]"), "Invalid config override: "),
        (LoadRequest(config='{"nonsense": 1}'), "Invalid config override: "),
        (
            LoadRequest(config='{"name": "vgg"}'),
            "unexpected directory name 'resnet' for model 'vgg', directory name must equal model name",
        ),
        *(
            (LoadRequest(config="{}", files={path: b"x"}), f"Invalid file parameter 'file:{path}' with normalized path")
            for path in ("../model", "1/../../model", "/../etc/passwd", "", "/", ".", "1/..", "1/\0")
        ),
        (
            LoadRequest(config="{}", files={"1/model": b"x", "1/model/deeper": b"y"}),
            "Invalid file parameter 'file:1/model/deeper', directory has been created as a file",
        ),
    ],
)
def test_a_bad_override_changes_nothing_and_says_why(tmp_path: Path, request_: LoadRequest, why: str) -> None:
    write_version(tmp_path, "resnet", 1)

    async def scenario(world: World) -> None:
        await world.repository.load("resnet")
        before = world.find("resnet")
        code, text = await refused(world.repository.load("resnet", request_))
        assert code is ErrorCode.INTERNAL
        assert text.startswith(f"failed to load 'resnet', failed to poll from model repository: {why}")
        if "normalized path" in why:
            assert text.endswith("must stay within model directory.")
        assert world.find("resnet") is before

    run(scenario, tmp_path, control="explicit")


# ---- polling


def test_polling_follows_models_and_versions_that_come_and_go(tmp_path: Path) -> None:
    write_version(tmp_path, "resnet", 1, "one")

    async def scenario(world: World) -> None:
        assert (await world.repository.start()).loaded == ("resnet",)
        assert await world.repository.poll() == [], "nothing changed"
        one = world.find("resnet")
        one.begin()
        write_version(tmp_path, "resnet", 2, "two")
        write_version(tmp_path, "bert", 1)
        assert await world.poll() == []
        assert world.index() == [("bert", "1", "READY"), ("resnet", "1", "UNLOADING"), ("resnet", "2", "READY")]
        one.end()
        await world.settled()
        (tmp_path / "resnet" / "2" / "model").unlink()
        (tmp_path / "resnet" / "2").rmdir()
        (tmp_path / "bert" / "1" / "model").unlink()
        (tmp_path / "bert" / "1").rmdir()
        (tmp_path / "bert").rmdir()
        assert await world.poll() == []
        assert world.find("resnet").content == "one", "back to the version before"
        await world.settled()
        assert world.index() == [("resnet", "1", "READY"), ("resnet", "2", "UNAVAILABLE", "unloaded")]
        assert world.repository.all_ready

    run(scenario, tmp_path, control="poll", poll_s=1e9)


def test_the_poll_loop_looks_again_after_every_pause(tmp_path: Path) -> None:
    async def main() -> None:
        loader = FakeLoader()
        pauses: list[float] = []
        go_on: asyncio.Queue[None] = asyncio.Queue()
        ready = asyncio.Event()

        async def sleep(seconds: float) -> None:
            pauses.append(seconds)
            await go_on.get()

        options = RepositoryOptions([tmp_path], control="poll", poll_s=15)
        repository = ModelRepository(options, loader, read_config, parse_json_config, sleep=sleep)
        repository.on_change.append(lambda change: ready.set() if change.serving else None)
        await repository.start()
        write_version(tmp_path, "resnet", 1)
        go_on.put_nowait(None)
        await ready.wait()
        assert repository.versions("resnet") == ["1"]
        assert set(pauses) == {15}
        await repository.stop(30)

    asyncio.run(main())


def test_a_broken_new_version_keeps_the_old_and_is_tried_ever_more_rarely(tmp_path: Path) -> None:
    write_version(tmp_path, "resnet", 1, "one")

    async def scenario(world: World) -> None:
        await world.repository.start()
        world.loader.failures["resnet:2"] = lambda: BackendError("corrupt")
        write_version(tmp_path, "resnet", 2, "tow")
        why = "load failed for model 'resnet': version 2 is at UNAVAILABLE state: Internal: corrupt;"
        assert await world.poll() == [why + "\n"]
        assert world.find("resnet").content == "one"
        assert world.index() == [
            ("resnet", "1", "READY", why), ("resnet", "2", "UNAVAILABLE", "Internal: corrupt"),
        ]  # fmt: skip
        assert world.repository.all_ready
        tried = []
        for look in range(1, 16):
            before = len(world.loader.calls)
            await world.poll()
            if len(world.loader.calls) > before:
                tried.append(look)
        assert tried == [1, 3, 7, 15]
        world.loader.failures.clear()
        write_version(tmp_path, "resnet", 2, "two")
        assert await world.poll() == [], "changed files are tried at once"
        assert world.find("resnet").content == "two"
        await world.settled()
        assert world.index() == [("resnet", "1", "UNAVAILABLE", "unloaded"), ("resnet", "2", "READY")]

    run(scenario, tmp_path, control="poll", poll_s=1e9)


def test_a_second_copy_of_a_served_model_changes_nothing_but_the_reason(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    write_version(a, "resnet", 1)
    b.mkdir()

    async def scenario(world: World) -> None:
        await world.repository.start()
        served = world.find("resnet")
        write_version(b, "resnet", 2)
        assert await world.poll() == []
        assert world.find("resnet") is served
        assert world.index() == [("resnet", "1", "READY", "model appears in two or more repositories")]
        (b / "resnet").rename(tmp_path / "away")
        assert await world.poll() == []
        assert world.index() == [("resnet", "1", "READY")]
        assert world.loader.calls == ["resnet:1"]

    run(scenario, a, b, control="poll", poll_s=1e9)


def test_rows_are_index_entries(tmp_path: Path) -> None:
    write_version(tmp_path, "resnet", 1)

    async def scenario(world: World) -> None:
        await world.repository.start()
        assert world.repository.index() == [IndexEntry("resnet", "1", "READY", "")]

    run(scenario, tmp_path)
