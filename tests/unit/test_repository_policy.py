"""Which versions should be served, and what is to be done about it: two pure functions, as tables."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf import text_format

from doorstep import proto
from doorstep.repository.reconcile import Abandon, Load, Swap, reconcile
from doorstep.repository.version_policy import All, Latest, Specific, choose, policy_of


@pytest.mark.parametrize(
    ("policy", "available", "chosen", "absent"),
    [
        (Latest(), [1, 2, 10], (10,), ()),
        (Latest(2), [1, 2, 10], (10, 2), ()),
        (Latest(9), [1, 2], (2, 1), ()),
        (Latest(), [], (), ()),
        (All(), [1, 3, 2], (3, 2, 1), ()),
        (All(), [], (), ()),
        (Specific((1, 3)), [1, 2, 3], (3, 1), ()),
        (Specific((1, 7)), [1, 2], (1,), (7,)),
        (Specific((7, 7)), [], (), (7,)),
    ],
)
def test_policy_chooses_versions(
    policy: Any, available: list[int], chosen: tuple[int, ...], absent: tuple[int, ...]
) -> None:
    assert choose(policy, available) == (chosen, absent)


@pytest.mark.parametrize(
    ("config", "policy"),
    [
        ("", Latest(1)),
        ("version_policy { latest { num_versions: 3 } }", Latest(3)),
        ("version_policy { all { } }", All()),
        ("version_policy { specific { versions: [ 1, 4 ] } }", Specific((1, 4))),
    ],
)
def test_policy_is_read_from_the_config(config: str, policy: Any) -> None:
    assert policy_of(text_format.Parse(config, proto.ModelConfig())) == policy


@pytest.mark.parametrize(
    ("wanted", "serving", "loaded", "failed", "action"),
    [
        # nothing to do
        ({}, {}, {}, (), None),
        ({1: "a"}, {1: "a"}, {}, (), None),
        # a new version is loaded first, then takes the old one's place in one step
        ({2: "b"}, {1: "a"}, {}, (), Load((2,))),
        ({2: "b"}, {1: "a"}, {2: "b"}, (), Swap((2,), (1,))),
        ({2: "b"}, {2: "b"}, {}, (), None),
        # several versions: the newest first, all of them before any is served
        ({1: "a", 2: "b", 3: "c"}, {}, {}, (), Load((3, 2, 1))),
        ({1: "a", 2: "b"}, {}, {2: "b"}, (), Load((1,))),
        ({1: "a", 2: "b"}, {}, {2: "b", 1: "a"}, (), Swap((2, 1), ())),
        # changed files of a version that serves: loaded again beside it, then swapped
        ({1: "A"}, {1: "a"}, {}, (), Load((1,))),
        ({1: "A"}, {1: "a"}, {1: "A"}, (), Swap((1,), (1,))),
        # one failure keeps everything as it was, and throws away the rest of the new ones
        ({1: "a", 2: "b"}, {}, {2: "b"}, (1,), Abandon((2,))),
        ({1: "a", 2: "b"}, {1: "old"}, {}, (1,), None),
        ({3: "c"}, {2: "b"}, {}, (3,), None),
        # versions that are no longer wanted
        ({1: "a"}, {1: "a", 2: "b"}, {}, (), Swap((), (2,))),
        ({}, {1: "a"}, {}, (), Swap((), (1,))),
    ],
)
def test_reconcile_says_the_next_step(wanted: Any, serving: Any, loaded: Any, failed: Any, action: Any) -> None:
    assert reconcile(wanted, serving, loaded, failed) == action


@pytest.mark.parametrize("fails", [(), (2,), (1, 2)])
def test_following_reconcile_to_its_end_never_leaves_a_model_without_a_version(fails: tuple[int, ...]) -> None:
    wanted, serving = {1: "A", 2: "b"}, {1: "a"}
    loaded: dict[int, str] = {}
    failed: set[int] = set()
    steps = 0
    while action := reconcile(wanted, serving, loaded, failed):
        steps += 1
        assert steps < 10
        match action:
            case Load(versions):
                failed |= set(versions) & set(fails)
                loaded |= {v: wanted[v] for v in versions if v not in fails}
            case Abandon(versions):
                loaded = {v: s for v, s in loaded.items() if v not in versions}
            case Swap(publish, retire):
                serving = {v: s for v, s in serving.items() if v not in retire} | {v: loaded.pop(v) for v in publish}
        assert serving, "nothing answers"
    assert not loaded
    assert serving == ({1: "a"} if fails else wanted)
