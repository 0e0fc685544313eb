"""The life of a version: its states, the index row it shows, and what listeners are told."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest

from doorstep.repository.base import ModelState, VersionSpec
from doorstep.repository.lifecycle import TRANSITIONS, UNLOADED, Life, ModelLifecycle, StateChange
from doorstep.testing.servables import FakeServable

LOADING, READY, UNLOADING, UNAVAILABLE = (
    ModelState.LOADING, ModelState.READY, ModelState.UNLOADING, ModelState.UNAVAILABLE,
)  # fmt: skip
STATES = (LOADING, READY, UNLOADING, UNAVAILABLE)
PATHS = {
    LOADING: (),
    READY: (READY,),
    UNLOADING: (READY, UNLOADING),
    UNAVAILABLE: (UNAVAILABLE,),
}


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def spec(version: int = 1) -> VersionSpec:
    return VersionSpec("resnet", str(version), Path("resnet"), Path("resnet") / str(version), None)


def life_in(state: ModelState, lifecycle: ModelLifecycle[FakeServable]) -> Life[FakeServable]:
    life = lifecycle.begin(spec(), "stamp")
    for step in PATHS[state]:
        lifecycle.change(life, step)
    return life


def test_the_table_knows_every_state_of_a_life() -> None:
    assert set(TRANSITIONS) == set(STATES)
    assert {new for after in TRANSITIONS.values() for new in after} == set(STATES) - {LOADING}, "each can be reached"
    assert [s for s in STATES if not TRANSITIONS[s]] == [UNAVAILABLE], "there is one end"


@pytest.mark.parametrize(("old", "new"), list(product(STATES, STATES)))
def test_only_the_transitions_in_the_table_happen(old: ModelState, new: ModelState) -> None:
    lifecycle: ModelLifecycle[FakeServable] = ModelLifecycle()
    life = life_in(old, lifecycle)
    if new in TRANSITIONS[old]:
        lifecycle.change(life, new)
        assert life.state is new
    else:
        with pytest.raises(AssertionError, match=f"resnet:1 {old.value}.* cannot become {new.value}"):
            lifecycle.change(life, new)
        assert life.state is old


def test_a_reload_stays_in_the_background_until_it_is_ready() -> None:
    lifecycle: ModelLifecycle[FakeServable] = ModelLifecycle()
    old = life_in(READY, lifecycle)
    new = lifecycle.begin(spec(), "changed")
    assert list(lifecycle.shown("resnet")) == [old]
    lifecycle.change(new, READY)
    lifecycle.change(old, UNLOADING)
    assert list(lifecycle.shown("resnet")) == [new]
    assert lifecycle.ready("resnet") == {1: new}
    lifecycle.change(old, UNAVAILABLE, UNLOADED)
    assert list(lifecycle.shown("resnet")) == [new]


def test_a_reload_that_fails_leaves_the_row_of_the_version_that_serves() -> None:
    lifecycle: ModelLifecycle[FakeServable] = ModelLifecycle()
    old = life_in(READY, lifecycle)
    lifecycle.change(lifecycle.begin(spec(), "changed"), UNAVAILABLE, "broken")
    assert list(lifecycle.shown("resnet")) == [old]


@pytest.mark.parametrize("state", [LOADING, UNLOADING, UNAVAILABLE])
def test_a_version_that_does_not_serve_gives_way_to_its_next_loading(state: ModelState) -> None:
    lifecycle: ModelLifecycle[FakeServable] = ModelLifecycle()
    life_in(state, lifecycle)
    new = lifecycle.begin(spec(), "changed")
    assert list(lifecycle.shown("resnet")) == [new]


def test_listeners_hear_of_every_change_and_how_long_the_state_before_lasted() -> None:
    clock = Clock()
    lifecycle: ModelLifecycle[FakeServable] = ModelLifecycle(clock)
    heard: list[StateChange] = []
    lifecycle.listeners.append(heard.append)
    life = lifecycle.begin(spec(2), "stamp")
    clock.now += 1.5
    lifecycle.change(life, READY)
    clock.now += 60
    lifecycle.change(life, UNLOADING)
    clock.now += 0.25
    lifecycle.change(life, UNAVAILABLE, UNLOADED)
    assert heard == [
        StateChange("resnet", "2", LOADING, "", 0.0, False),
        StateChange("resnet", "2", READY, "", 1.5, True),
        StateChange("resnet", "2", UNLOADING, "", 60.0, False),
        StateChange("resnet", "2", UNAVAILABLE, UNLOADED, 0.25, False),
    ]


def test_a_listener_that_raises_stops_nobody(caplog: pytest.LogCaptureFixture) -> None:
    lifecycle: ModelLifecycle[FakeServable] = ModelLifecycle()
    heard: list[StateChange] = []

    def broken(change: StateChange) -> None:
        raise RuntimeError("listener broke")

    lifecycle.listeners += [broken, heard.append]
    assert life_in(READY, lifecycle).state is READY
    assert [change.state for change in heard] == [LOADING, READY]
    assert "listener broke" in caplog.text


def test_each_event_is_one_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="doorstep.repository")
    clock = Clock()
    lifecycle: ModelLifecycle[FakeServable] = ModelLifecycle(clock)
    life = lifecycle.begin(spec(), "stamp")
    clock.now += 0.42
    lifecycle.change(life, READY)
    lifecycle.change(life, UNLOADING)
    lifecycle.change(life, UNAVAILABLE, UNLOADED)
    lifecycle.change(lifecycle.begin(spec(2), "stamp"), UNAVAILABLE, "Internal: no such file")
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        ("INFO", "loading: resnet:1"),
        ("INFO", "successfully loaded 'resnet' version 1 in 0.420 s"),
        ("INFO", "unloading: resnet:1"),
        ("INFO", "successfully unloaded 'resnet' version 1"),
        ("INFO", "loading: resnet:2"),
        ("ERROR", "failed to load 'resnet' version 2: Internal: no such file"),
    ]
    assert {(r.model, r.version) for r in caplog.records} == {("resnet", "1"), ("resnet", "2")}  # type: ignore[attr-defined]
