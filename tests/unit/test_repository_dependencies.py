"""Ensembles in the repository: their models first, why one is not served, what becomes of it when they change; models
of the same name; repository agents. Fake models, a real disk. Texts are Triton's (model_repository_manager.cc)."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from doorstep.config.load import parse_json_config
from doorstep.errors import BackendError, DoorstepError, ErrorCode, InvalidArgument
from doorstep.repository.repository import ModelRepository, RepositoryOptions
from doorstep.testing.servables import FakeLoader, FakeServable, read_config, write_version


def steps(*names: str, version: int = -1) -> str:
    listed = " ".join(f'step {{ model_name: "{name}" model_version: {version} }}' for name in names)
    return f'platform: "ensemble" ensemble_scheduling {{ {listed} }}'


class World:
    def __init__(self, *repositories: Path, **options: Any) -> None:
        self.loader = FakeLoader()
        self.misfits: dict[str, str] = {}  # ensemble → why its steps do not fit
        self.repository: ModelRepository[FakeServable] = ModelRepository(
            RepositoryOptions(repositories, **options),
            self.loader,
            read_config,
            parse_json_config,
            check_ensemble=self.check_ensemble,
        )
        self.find = self.repository.find

    def check_ensemble(self, config: Any) -> None:
        for step in config.ensemble_scheduling.step:
            name = f"{step.model_namespace}::{step.model_name}" if step.model_namespace else step.model_name
            assert self.find(name, "")
        if config.name in self.misfits:
            raise InvalidArgument(self.misfits[config.name])

    async def poll(self) -> list[str]:
        tasks = await self.repository.poll()
        return [str(e) for e in await asyncio.gather(*tasks, return_exceptions=True) if e is not None]

    @property
    def served(self) -> list[str]:
        return sorted(f"{s.spec.identity}:{s.spec.version}" for s in self.repository.servables())


def run(scenario: Callable[[World], Coroutine[Any, Any, None]], *repositories: Path, **options: Any) -> None:
    async def main() -> None:
        world = World(*repositories, **options)
        try:
            await asyncio.wait_for(scenario(world), 60)
        finally:
            assert await world.repository.stop(30) == []
        assert all(made.closed.is_set() for made in world.loader.made), "everything loaded has been closed"

    asyncio.run(main())


async def refused(work: Coroutine[Any, Any, None]) -> tuple[ErrorCode, str]:
    with pytest.raises(DoorstepError) as caught:
        await work
    return caught.value.code, caught.value.message


def pipeline(folder: Path, *needed: str, name: str = "pipeline", version: int = -1) -> None:
    write_version(folder, name, 1, config=steps(*needed, version=version))


def test_loading_an_ensemble_loads_its_models_first(tmp_path: Path) -> None:
    pipeline(tmp_path, "encoder", "inner", "encoder")
    pipeline(tmp_path, "decoder", name="inner")
    for name in ("encoder", "decoder", "other"):
        write_version(tmp_path, name, 1)

    async def scenario(world: World) -> None:
        await world.repository.load("pipeline")
        assert world.served == ["decoder:1", "encoder:1", "inner:1", "pipeline:1"]
        calls = world.loader.calls
        assert calls.index("decoder:1") < calls.index("inner:1") < calls.index("pipeline:1")
        assert sorted(calls) == world.served, "each once"
        await world.repository.load("pipeline")
        assert sorted(calls) == world.served, "nothing has changed"

    run(scenario, tmp_path, control="explicit")


@pytest.mark.parametrize("control", ["none", "poll"])
def test_at_the_start_an_ensemble_waits_for_its_models(tmp_path: Path, control: str) -> None:
    pipeline(tmp_path, "zebra", "inner", name="a_pipeline")
    pipeline(tmp_path, "zebra", name="inner")
    write_version(tmp_path, "zebra", 1)

    async def scenario(world: World) -> None:
        world.loader.hold("zebra:1")
        starting = asyncio.create_task(world.repository.start())
        await world.loader.entered("zebra:1")
        assert world.loader.calls == ["zebra:1"]
        world.loader.let_go("zebra:1")
        report = await starting
        assert report.failures == {}
        assert world.loader.calls == ["zebra:1", "inner:1", "a_pipeline:1"]

    run(scenario, tmp_path, control=control)


LOST = "version 1 is at UNAVAILABLE state: Internal: out of memory;"


def test_what_an_ensemble_lacks_is_named(tmp_path: Path) -> None:
    pipeline(tmp_path, "encoder", "nobody", "gone")
    pipeline(tmp_path, "encoder", name="second")
    pipeline(tmp_path, "decoder", name="third", version=7)
    pipeline(tmp_path, "second", name="fourth")
    for name in ("encoder", "decoder"):
        write_version(tmp_path, name, 1)

    async def scenario(world: World) -> None:
        world.loader.failures["encoder:1"] = lambda: BackendError("out of memory")
        start = "load failed for model"
        assert await refused(world.repository.load("pipeline")) == (
            ErrorCode.INVALID_ARG,
            f"{start} 'pipeline': ensemble pipeline contains models that are not available or ambiguous: "
            "gone, nobody\n",
        )
        second = (
            f"ensemble 'second' depends on 'encoder' which has no loaded version. Model 'encoder' loading failed with "
            f"error: {LOST}"
        )
        assert await refused(world.repository.load("second")) == (
            ErrorCode.INVALID_ARG,
            f"{start} 'second': {second}\n",
        )
        assert (await refused(world.repository.load("third")))[1] == (
            f"{start} 'third': ensemble 'third' depends on 'decoder' whose required version 7 is not loaded.\n"
        )
        assert (await refused(world.repository.load("fourth")))[1] == (
            f"{start} 'fourth': ensemble 'fourth' depends on 'second' which is not valid. Model 'second' failed with "
            f"error: {second}\n"
        )
        assert world.served == ["decoder:1"]

    run(scenario, tmp_path, control="explicit")


@pytest.mark.parametrize("control", ["none", "explicit"])
def test_ensembles_that_need_each_other_are_refused(tmp_path: Path, control: str) -> None:
    pipeline(tmp_path, "b", name="a")
    pipeline(tmp_path, "c", name="b")
    pipeline(tmp_path, "a", name="c")
    pipeline(tmp_path, "self", name="self")

    async def scenario(world: World) -> None:
        if control == "none":
            report = await world.repository.start()
            errors = report.failures
        else:
            errors = {}
            for name in ("a", "self"):
                errors[name] = (await refused(world.repository.load(name)))[1].rstrip("\n")
        circle = "circular dependency between ensembles"
        assert errors["a"] == f"load failed for model 'a': {circle}: a -> ... -> c -> a"
        assert errors["self"] == f"load failed for model 'self': {circle}: self -> ... -> self -> self"
        assert world.served == []

    run(scenario, tmp_path, control=control)


def test_steps_that_do_not_fit_are_told_as_the_ensembles_failure(tmp_path: Path) -> None:
    pipeline(tmp_path, "encoder")
    write_version(tmp_path, "encoder", 1)

    async def scenario(world: World) -> None:
        world.misfits["pipeline"] = "in ensemble pipeline, everything is wrong"
        assert (await refused(world.repository.load("pipeline")))[1] == (
            "load failed for model 'pipeline': in ensemble pipeline, everything is wrong\n"
        )
        assert world.served == ["encoder:1"]
        world.misfits.clear()
        await world.repository.load("pipeline")
        assert world.served == ["encoder:1", "pipeline:1"]

    run(scenario, tmp_path, control="explicit")


def test_an_ensemble_goes_with_the_model_it_needs_and_comes_back_with_it(tmp_path: Path) -> None:
    pipeline(tmp_path, "encoder", "decoder")
    pipeline(tmp_path, "pipeline", name="outer")
    for name in ("encoder", "decoder"):
        write_version(tmp_path, name, 1)

    async def scenario(world: World) -> None:
        await world.repository.load("outer")
        await world.repository.unload("encoder")
        assert world.served == ["decoder:1"]
        while world.repository._loader._retiring:
            await asyncio.wait(world.repository._loader._retiring)
        reasons = {row.name: (row.state, row.reason) for row in world.repository.index()}
        assert reasons["pipeline"] == ("UNAVAILABLE", "unloaded")
        await world.repository.load("encoder")
        assert world.served == ["decoder:1", "encoder:1", "outer:1", "pipeline:1"]

    run(scenario, tmp_path, control="explicit")


@pytest.mark.parametrize("control", ["explicit", "poll"])
def test_an_ensemble_is_made_anew_when_a_model_it_needs_is(tmp_path: Path, control: str) -> None:
    pipeline(tmp_path, "encoder", "decoder")
    for name in ("encoder", "decoder"):
        write_version(tmp_path, name, 1, "old")

    async def scenario(world: World) -> None:
        if control == "explicit":
            await world.repository.load("pipeline")
        else:
            await world.repository.start()
        first = world.find("pipeline")
        first.begin()
        write_version(tmp_path, "encoder", 1, "new")
        write_version(tmp_path, "decoder", 1, "new")
        if control == "explicit":
            await world.repository.load("encoder")
            second = world.find("pipeline")
            assert second is not first
            await world.repository.load("pipeline")  # the other model, too
            assert world.loader.calls.count("pipeline:1") == 3
        else:
            assert await world.poll() == []
            assert world.loader.calls.count("pipeline:1") == 2, "once for both"
        assert {world.find(name).content for name in ("encoder", "decoder")} == {"new"}
        assert world.find("pipeline") is not first
        assert not first.closed.is_set(), "what it had taken is answered first"
        first.end()

    run(scenario, tmp_path, control=control)


def test_a_new_model_that_does_not_fit_takes_the_ensemble_down(tmp_path: Path) -> None:
    pipeline(tmp_path, "encoder")
    write_version(tmp_path, "encoder", 1, "old")

    async def scenario(world: World) -> None:
        await world.repository.load("pipeline")
        write_version(tmp_path, "encoder", 1, "new")
        world.misfits["pipeline"] = "no"
        await world.repository.load("encoder")
        assert world.served == ["encoder:1"]
        world.loader.failures["encoder:1"] = lambda: BackendError("out of memory")
        write_version(tmp_path, "encoder", 1, "newer")
        world.misfits.clear()
        await refused(world.repository.load("encoder"))
        assert world.served == ["encoder:1"], "what was served of it still is, and it is as it was"

    run(scenario, tmp_path, control="explicit")


def test_polling_serves_an_ensemble_as_soon_as_its_models_are_there(tmp_path: Path) -> None:
    pipeline(tmp_path, "encoder")

    async def scenario(world: World) -> None:
        report = await world.repository.start()
        assert list(report.failures) == ["pipeline"]
        write_version(tmp_path, "encoder", 1)
        assert await world.poll() == []
        assert world.served == ["encoder:1", "pipeline:1"]
        (tmp_path / "encoder").rename(tmp_path / ".encoder")
        await world.poll()
        assert world.served == []

    run(scenario, tmp_path, control="poll")


def test_unloading_dependents_leaves_what_others_need_and_what_was_asked_for(tmp_path: Path) -> None:
    pipeline(tmp_path, "encoder", "decoder", "inner", "named")
    pipeline(tmp_path, "decoder", name="other")
    pipeline(tmp_path, "deep", name="inner")
    for name in ("encoder", "decoder", "named", "deep"):
        write_version(tmp_path, name, 1)

    async def scenario(world: World) -> None:
        for name in ("pipeline", "other", "named"):
            await world.repository.load(name)
        await world.repository.unload("pipeline", unload_dependents=True)
        assert world.served == ["decoder:1", "named:1", "other:1"]
        await world.repository.load("pipeline")
        await world.repository.unload("pipeline", unload_dependents=False)
        assert world.served == ["decoder:1", "deep:1", "encoder:1", "inner:1", "named:1", "other:1"]

    run(scenario, tmp_path, control="explicit")


def test_loads_and_unloads_of_related_models_wait_for_each_other(tmp_path: Path) -> None:
    pipeline(tmp_path, "encoder", "decoder")
    pipeline(tmp_path, "encoder", name="other")
    for name in ("encoder", "decoder"):
        write_version(tmp_path, name, 1)

    async def scenario(world: World) -> None:
        for _ in range(5):
            calls = [world.repository.load(n) for n in ("pipeline", "other", "decoder", "encoder")]
            calls += [world.repository.unload(n, True) for n in ("pipeline", "encoder", "other")]
            await asyncio.gather(*calls, return_exceptions=True)
        for name in ("pipeline", "other"):
            await world.repository.load(name)
        assert world.served == ["decoder:1", "encoder:1", "other:1", "pipeline:1"]

    run(scenario, tmp_path, control="explicit")


# ---- models of the same name


@pytest.mark.parametrize("control", ["none", "explicit"])
def test_models_of_one_name_are_told_apart_by_their_repository(tmp_path: Path, control: str) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        write_version(folder, "same", 1, folder.name)
        pipeline(folder, "same", "single", name=f"pipeline_{folder.name}")
    write_version(two, "single", 1)

    async def scenario(world: World) -> None:
        if control == "none":
            assert (await world.repository.start()).failures == {}
        else:
            for name in ("same", "pipeline_one", "pipeline_two"):
                await world.repository.load(name)
        assert world.served == sorted(
            [f"{one}::same:1", f"{two}::same:1", f"{one}::pipeline_one:1", f"{two}::pipeline_two:1", f"{two}::single:1"]
        )
        assert world.find("single").spec.namespace == str(two)
        with pytest.raises(InvalidArgument) as caught:
            world.find("same")
        assert caught.value.message == (
            "There are 2 identifiers of model 'same' in global map, model namespace must be provided to resolve "
            "ambiguity."
        )
        with pytest.raises(InvalidArgument, match="Request for unknown model: 'nobody' is not found"):
            world.find("nobody")
        for folder in (one, two):
            config = world.find(f"pipeline_{folder.name}").spec.config
            spaces = [step.model_namespace for step in config.ensemble_scheduling.step]
            assert spaces == [str(folder), str(two)], "its own repository's, else the only one there is"
        rows = {(row.namespace, row.name) for row in world.repository.index() if row.name == "same"}
        assert rows == {(str(one), "same"), (str(two), "same")}
        if control == "explicit":
            await world.repository.unload("same")
            assert world.served == [f"{two}::single:1"]

    run(scenario, one, two, control=control, namespacing=True)


def test_an_ensemble_finds_the_model_of_another_repository_when_its_own_has_gone(tmp_path: Path) -> None:
    one, two, elsewhere = tmp_path / "one", tmp_path / "two", tmp_path / "elsewhere"
    for folder in (one, two):
        write_version(folder, "same", 1, folder.name)
        pipeline(folder, "same", name=f"pipeline_{folder.name}")

    async def scenario(world: World) -> None:
        def needed() -> list[str]:
            configs = [world.find(f"pipeline_{folder.name}").spec.config for folder in (one, two)]
            return [step.model_namespace for config in configs for step in config.ensemble_scheduling.step]

        await world.repository.start()
        (one / "same").rename(elsewhere)
        for name in ("pipeline_one", "pipeline_two"):
            await world.repository.load(name)
        assert needed() == [str(two), str(two)]
        elsewhere.rename(one / "same")
        await world.repository.load("pipeline_one")
        assert needed() == [str(one), str(two)]

    run(scenario, one, two, control="explicit", namespacing=True)


# ---- agents

AGENT = 'model_repository_agents {{ agents {{ name: "{}" parameters {{ key: "{}" value: "{}" }} }} }}'
MD5 = hashlib.md5(b"weights", usedforsecurity=False).hexdigest()


@pytest.mark.parametrize(("name", "key", "value", "error"), [
    ("checksum", "MD5:1/model", MD5, ""),
    ("checksum", "md5:1/model", MD5, ""),
    ("checksum", "MD5:1/model", "0" * 32, f"Mismatched MD5 hash for file 1/model, expect: {'0' * 32}, got: {MD5}"),
    ("checksum", "SHA1:1/model", MD5, "Unsupported checksum algorithm: SHA1"),
    ("checksum", "1/model", MD5, "failed to parse key: 1/model"),
    ("checksum", "MD5:1/none", MD5, "failed to open text file for read 1/none: No such file or directory"),
    ("nobody", "a", "b", "unable to find 'libtritonrepoagent_nobody.so' for repo agent 'nobody', searched: "),
])  # fmt: skip
def test_agents_look_at_a_model_before_it_is_loaded(
    tmp_path: Path, name: str, key: str, value: str, error: str
) -> None:
    write_version(tmp_path, "resnet", 1, "weights", config=AGENT.format(name, key, value))

    async def scenario(world: World) -> None:
        if not error:
            await world.repository.load("resnet")
            assert world.served == ["resnet:1"]
            return
        code, text = await refused(world.repository.load("resnet"))
        assert code is ErrorCode.INTERNAL
        assert text.startswith(f"failed to load 'resnet', failed to poll from model repository: {error}")
        assert world.loader.calls == []

    run(scenario, tmp_path, control="explicit")


def test_what_an_agent_refuses_leaves_what_was_served(tmp_path: Path) -> None:
    write_version(tmp_path, "resnet", 1, "weights", config=AGENT.format("checksum", "MD5:1/model", MD5))

    async def scenario(world: World) -> None:
        await world.repository.load("resnet")
        write_version(tmp_path, "resnet", 1, "tampered")
        assert "Mismatched MD5" in (await refused(world.repository.load("resnet")))[1]
        assert world.find("resnet").content == "weights"

    run(scenario, tmp_path, control="explicit")
