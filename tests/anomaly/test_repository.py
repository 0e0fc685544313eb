"""The model repository while things go wrong: loads that fail or hang, files that vanish, calls that cross each other.

Nothing sleeps: a fake loader waits at gates which the test opens.
"""

from __future__ import annotations

import asyncio
import random
import shutil
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from doorstep.config.load import parse_json_config
from doorstep.errors import BackendError, DoorstepError, Unavailable
from doorstep.repository.base import VersionSpec
from doorstep.repository.repository import ModelRepository, RepositoryOptions
from doorstep.testing.servables import FakeLoader, FakeServable, read_config, write_version

ALL = "version_policy { all { } }"
Repository = ModelRepository[FakeServable]


def make(loader: Callable[[VersionSpec], FakeServable], *repositories: Path, **options: Any) -> Repository:
    return ModelRepository(RepositoryOptions(repositories, **options), loader, read_config, parse_json_config)


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(main)


async def settled(repository: Repository) -> None:
    while repository._loader._retiring:
        await asyncio.wait(repository._loader._retiring)


async def everything_closed(repository: Repository, loader: FakeLoader) -> None:
    assert await repository.stop(30) == []
    assert all(made.closed.is_set() for made in loader.made)
    assert repository.servables() == []


def rows(repository: Repository) -> list[tuple[str, str, str]]:
    return [(e.version, e.state, e.reason) for e in repository.index()]


def test_a_load_that_fails_half_way_serves_nothing_new_and_leaks_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        loader = FakeLoader()
        repository = make(loader, tmp_path, control="explicit", load_threads=1)
        write_version(tmp_path, "resnet", 1, "old", config=ALL)
        await repository.load("resnet")
        write_version(tmp_path, "resnet", 1, "new")
        write_version(tmp_path, "resnet", 2)
        write_version(tmp_path, "resnet", 3)
        loader.failures["resnet:1"] = lambda: BackendError("truncated")
        with pytest.raises(DoorstepError, match="version 1 is at UNAVAILABLE state: Internal: truncated;"):
            await repository.load("resnet")
        assert loader.calls == ["resnet:1", "resnet:3", "resnet:2", "resnet:1"], "the others were loaded by then"
        assert (repository.find("resnet").content, repository.versions("resnet")) == ("old", ["1"])
        await settled(repository)
        thrown_away = [made for made in loader.made if made.spec.version in "23"]
        assert len(thrown_away) == 2
        assert all(made.closed.is_set() for made in thrown_away)
        because = "not served: version 1 failed to load"
        assert rows(repository)[1:] == [("2", "UNAVAILABLE", because), ("3", "UNAVAILABLE", because)]
        loader.failures.clear()
        await repository.load("resnet")
        assert repository.versions("resnet") == ["1", "2", "3"]
        await everything_closed(repository, loader)

    run(main())


@pytest.mark.parametrize(
    "exception", [SystemExit(3), KeyboardInterrupt(), MemoryError("no room"), RecursionError("deep")]
)
def test_whatever_a_models_code_raises_is_that_models_failure_alone(tmp_path: Path, exception: BaseException) -> None:
    async def main() -> None:
        loader = FakeLoader()
        loader.failures["rude:1"] = lambda: exception
        write_version(tmp_path, "rude", 1)
        write_version(tmp_path, "polite", 1)
        repository = make(loader, tmp_path)
        report = await repository.start()
        assert report.loaded == ("polite",)
        assert f"unexpected {type(exception).__name__}" in report.failures["rude"]
        await everything_closed(repository, loader)

    run(main())


def test_a_config_reader_that_breaks_is_that_models_failure_alone(tmp_path: Path) -> None:
    async def main() -> None:
        def read(directory: Path, name: str) -> Any:
            if name == "odd":
                raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")
            return read_config(directory, name)

        loader = FakeLoader()
        write_version(tmp_path, "odd", 1)
        write_version(tmp_path, "good", 1)
        repository: Repository = ModelRepository(RepositoryOptions([tmp_path]), loader, read, parse_json_config)
        report = await repository.start()
        assert report.loaded == ("good",)
        assert "unexpected UnicodeDecodeError" in report.failures["odd"]
        await everything_closed(repository, loader)

    run(main())


def test_files_that_vanish_between_the_look_and_the_load_fail_the_load_and_keep_the_old(tmp_path: Path) -> None:
    async def main() -> None:
        fake = FakeLoader()

        def load(spec: VersionSpec) -> FakeServable:
            if spec.version == "2":
                shutil.rmtree(spec.version_directory)
                try:
                    (spec.version_directory / "model").read_text()
                except FileNotFoundError as error:
                    raise BackendError(f"cannot read {Path(error.filename).name}") from None
            return fake(spec)

        repository = make(load, tmp_path, control="poll", poll_s=1e9)
        write_version(tmp_path, "resnet", 1, "one")
        await repository.start()
        write_version(tmp_path, "resnet", 2)
        (task,) = await repository.poll()
        with pytest.raises(DoorstepError, match="cannot read model"):
            await task
        assert repository.find("resnet").content == "one"
        await asyncio.gather(*await repository.poll())
        assert repository.find("resnet").content == "one"
        assert [r for r in rows(repository) if r[1] == "READY"] == [("1", "READY", "")]
        await everything_closed(repository, fake)

    run(main())


def test_a_repository_that_vanishes_takes_nothing_down(tmp_path: Path) -> None:
    async def main() -> None:
        loader = FakeLoader()
        write_version(tmp_path / "a", "resnet", 1)
        write_version(tmp_path / "b", "bert", 1)
        repository = make(loader, tmp_path / "a", tmp_path / "b", control="poll", poll_s=1e9)
        await repository.start()
        (tmp_path / "a").rename(tmp_path / "unmounted")
        assert await repository.poll() == []
        assert repository.versions("resnet") == ["1"]
        assert [e.name for e in repository.index()] == ["bert", "resnet"]
        (tmp_path / "unmounted").rename(tmp_path / "a")
        shutil.rmtree(tmp_path / "a" / "resnet")
        await asyncio.gather(*await repository.poll())
        assert repository.versions("resnet") == []
        await everything_closed(repository, loader)

    run(main())


def test_a_model_that_hangs_while_it_loads_holds_up_no_other(tmp_path: Path) -> None:
    async def main() -> None:
        loader = FakeLoader()
        loader.hold("slow:1")
        write_version(tmp_path, "slow", 1)
        write_version(tmp_path, "quick", 1)
        repository = make(loader, tmp_path, control="explicit", load_threads=2)
        slow = asyncio.ensure_future(repository.load("slow"))
        await loader.entered("slow:1")
        await repository.load("quick")
        assert repository.versions("quick") == ["1"]
        assert repository.index()[1].state == "LOADING"
        assert not repository.all_ready
        with pytest.raises(Unavailable, match="'slow' version 1 is not at ready state"):
            repository.find("slow", "1")
        await repository.unload("quick")
        loader.let_go("slow:1")
        await slow
        assert repository.all_ready
        await everything_closed(repository, loader)

    run(main())


def test_polling_goes_on_while_a_model_hangs(tmp_path: Path) -> None:
    async def main() -> None:
        loader = FakeLoader()
        repository = make(loader, tmp_path, control="poll", poll_s=1e9)
        await repository.start()
        loader.hold("slow:1")
        write_version(tmp_path, "slow", 1)
        (slow,) = await repository.poll()
        await loader.entered("slow:1")
        write_version(tmp_path, "quick", 1)
        write_version(tmp_path, "slow", 2)
        await asyncio.gather(*await repository.poll())
        assert repository.versions("quick") == ["1"]
        loader.let_go("slow:1")
        await slow
        assert repository.versions("slow") == ["1"]
        await asyncio.gather(*await repository.poll())
        assert repository.versions("slow") == ["2"], "what changed meanwhile is seen by the next look"
        await everything_closed(repository, loader)

    run(main())


def test_unload_during_a_load_waits_its_turn_and_wins(tmp_path: Path) -> None:
    async def main() -> None:
        loader = FakeLoader()
        loader.hold("resnet:1")
        write_version(tmp_path, "resnet", 1)
        repository = make(loader, tmp_path, control="explicit")
        load = asyncio.ensure_future(repository.load("resnet"))
        await loader.entered("resnet:1")
        unload = asyncio.ensure_future(repository.unload("resnet"))
        loader.let_go("resnet:1")
        await asyncio.gather(load, unload)
        assert repository.versions("resnet") == []
        await settled(repository)
        assert rows(repository) == [("1", "UNAVAILABLE", "unloaded")]
        await everything_closed(repository, loader)

    run(main())


def test_fifty_loads_and_unloads_at_once_end_as_the_last_one_says(tmp_path: Path) -> None:
    async def main(seed: int) -> None:
        dice = random.Random(seed)
        loader = FakeLoader()
        repository = make(loader, tmp_path, control="explicit")
        calls = [dice.choice(["load", "unload"]) for _ in range(50)]
        await asyncio.gather(*(getattr(repository, call)("resnet") for call in calls))
        assert repository.versions("resnet") == (["1"] if calls[-1] == "load" else [])
        await settled(repository)
        open_now = [made for made in loader.made if not made.closed.is_set()]
        assert open_now == repository.servables()
        assert repository._turns._locks == {}, "nothing is remembered of calls that are over"
        await everything_closed(repository, loader)

    write_version(tmp_path, "resnet", 1)
    for seed in range(4):
        run(main(seed))


def test_different_models_load_side_by_side(tmp_path: Path) -> None:
    async def main() -> None:
        loader = FakeLoader()
        names = ["a", "b", "c", "d"]
        for name in names:
            write_version(tmp_path, name, 1)
            loader.hold(f"{name}:1")
        repository = make(loader, tmp_path, load_threads=4)
        start = asyncio.ensure_future(repository.start())
        await asyncio.gather(*(loader.entered(f"{name}:1") for name in names))
        for name in names:
            loader.let_go(f"{name}:1")
        assert (await start).loaded == tuple(names)
        await everything_closed(repository, loader)

    run(main())


def test_requests_finish_on_the_version_that_took_them(tmp_path: Path) -> None:
    async def main() -> None:
        loader = FakeLoader()
        repository = make(loader, tmp_path, control="explicit")
        write_version(tmp_path, "resnet", 1, "old")
        await repository.load("resnet")
        old = repository.find("resnet")
        old.begin()
        write_version(tmp_path, "resnet", 1, "new")
        await repository.load("resnet")
        new = repository.find("resnet")
        assert (old.content, new.content) == ("old", "new")
        assert old.stopped
        assert not old.closed.is_set()
        new.begin()
        await repository.unload("resnet")
        assert rows(repository) == [("1", "UNLOADING", "")]
        old.end()
        new.end()
        await settled(repository)
        assert old.closed.is_set()
        assert new.closed.is_set()
        assert rows(repository) == [("1", "UNAVAILABLE", "unloaded")]
        await everything_closed(repository, loader)

    run(main())


def test_reloading_under_load_refuses_no_request_and_mixes_no_versions(tmp_path: Path) -> None:
    async def main() -> None:
        loader = FakeLoader()
        repository = make(loader, tmp_path, control="explicit")
        write_version(tmp_path, "resnet", 1, "0")
        await repository.load("resnet")
        answers: list[int] = []
        over = asyncio.Event()

        async def client() -> None:
            while not over.is_set():
                servable = repository.find("resnet")
                servable.begin()
                content = servable.content
                await asyncio.sleep(0)
                assert servable.content == content
                servable.end()
                answers.append(int(content))

        clients = [asyncio.ensure_future(client()) for _ in range(8)]
        for number in range(1, 21):
            write_version(tmp_path, "resnet", 1, str(number))
            await repository.load("resnet")
        over.set()
        await asyncio.gather(*clients)
        assert len(answers) > 100
        assert set(answers) <= set(range(21))
        await settled(repository)
        assert sum(not made.closed.is_set() for made in loader.made) == 1
        await everything_closed(repository, loader)

    run(main())


def test_a_caller_who_goes_away_does_not_stop_the_load(tmp_path: Path) -> None:
    async def main() -> None:
        loader = FakeLoader()
        loader.hold("resnet:1")
        write_version(tmp_path, "resnet", 1)
        repository = make(loader, tmp_path, control="explicit")
        ready = asyncio.Event()
        repository.on_change.append(lambda change: ready.set() if change.serving else None)
        caller = asyncio.ensure_future(repository.load("resnet"))
        await loader.entered("resnet:1")
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        loader.let_go("resnet:1")
        await ready.wait()
        assert repository.versions("resnet") == ["1"]
        await everything_closed(repository, loader)

    run(main())


def test_stopping_during_a_load_closes_what_the_load_makes(tmp_path: Path) -> None:
    async def main() -> None:
        loader = FakeLoader()
        loader.hold("resnet:1")
        write_version(tmp_path, "resnet", 1)
        repository = make(loader, tmp_path, control="explicit")
        load = asyncio.ensure_future(repository.load("resnet"))
        await loader.entered("resnet:1")
        stop = asyncio.ensure_future(repository.stop(30))
        with pytest.raises(Unavailable, match="Server not ready"):
            await load
        assert not stop.done(), "the loading thread cannot be interrupted"
        loader.let_go("resnet:1")
        assert await stop == []
        (made,) = loader.made
        assert made.closed.is_set()
        assert rows(repository) == [("1", "UNAVAILABLE", "loading was stopped")]
        with pytest.raises(Unavailable, match="Server not ready"):
            await repository.load("resnet")

    run(main())


def test_stopping_says_what_would_not_end(tmp_path: Path) -> None:
    async def main() -> None:
        loader = FakeLoader()
        loader.hold("hangs:1")
        write_version(tmp_path, "hangs", 1)
        write_version(tmp_path, "busy", 1)
        repository = make(loader, tmp_path, control="explicit")
        await repository.load("busy")
        busy = repository.find("busy")
        busy.begin()
        hanging = asyncio.ensure_future(repository.load("hangs"))
        await loader.entered("hangs:1")
        assert await repository.stop(0.01) == ["loading hangs:1", "draining busy:1 (1 in flight)"]
        assert not busy.closed.is_set(), "never closed under a running request"
        with pytest.raises(Unavailable):
            await hanging
        loader.let_go("hangs:1")

    run(main())


def test_stopping_while_the_first_models_load_ends_the_start(tmp_path: Path) -> None:
    async def main() -> None:
        loader = FakeLoader()
        loader.hold("resnet:3")
        write_version(tmp_path, "resnet", 1, config=ALL)
        write_version(tmp_path, "resnet", 2)
        write_version(tmp_path, "resnet", 3)
        repository = make(loader, tmp_path, control="poll", load_threads=1)
        start = asyncio.ensure_future(repository.start())
        await loader.entered("resnet:3")
        stop = asyncio.ensure_future(repository.stop(30))
        report = await start
        assert (report.loaded, report.failures) == ((), {"resnet": "the server is stopping"})
        loader.let_go("resnet:3")
        assert await stop == []
        assert loader.calls == ["resnet:3"], "what had not begun never does"

    run(main())


def test_a_model_that_cannot_be_closed_is_unloaded_all_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        class Sticky(FakeServable):
            def close(self) -> None:
                super().close()
                raise OSError("device is busy")

        repository: Repository = make(Sticky, tmp_path, control="explicit")
        write_version(tmp_path, "resnet", 1)
        await repository.load("resnet")
        await repository.unload("resnet")
        await settled(repository)
        assert rows(repository) == [("1", "UNAVAILABLE", "unloaded")]
        await repository.load("resnet")
        assert repository.versions("resnet") == ["1"]
        assert await repository.stop(30) == []

    run(main())
    assert "device is busy" in caplog.text


def test_versions_added_and_removed_while_polling_are_followed_under_requests(tmp_path: Path) -> None:
    async def main() -> None:
        loader = FakeLoader()
        write_version(tmp_path, "resnet", 1, "1", config="version_policy { latest { num_versions: 2 } }")
        repository = make(loader, tmp_path, control="poll", poll_s=1e9)
        await repository.start()
        dice = random.Random(7)
        present = {1}
        for number in range(2, 30):
            held = repository.find("resnet")
            held.begin()
            if len(present) > 2 and dice.random() < 0.5:
                gone = dice.choice(sorted(present))
                present.discard(gone)
                shutil.rmtree(tmp_path / "resnet" / str(gone))
            else:
                present.add(number)
                write_version(tmp_path, "resnet", number, str(number))
            await asyncio.gather(*await repository.poll())
            assert repository.versions("resnet") == [str(v) for v in sorted(present)[-2:]]
            assert repository.find("resnet").content == str(max(present))
            held.end()
        await settled(repository)
        assert sum(not made.closed.is_set() for made in loader.made) == 2
        await everything_closed(repository, loader)

    run(main())
