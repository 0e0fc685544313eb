"""Which instance a prompt goes to: the one that was given most of its beginning, as a table. Pure."""

from __future__ import annotations

import os
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from doorstep.scheduler.affinity import BLOCK_BYTES, MOST_BLOCKS, REMEMBERED, Affinity, blocks_of

A, B, C = ("a" * BLOCK_BYTES).encode(), ("b" * BLOCK_BYTES).encode(), ("c" * BLOCK_BYTES).encode()


@given(st.binary(max_size=3 * BLOCK_BYTES), st.binary(max_size=3 * BLOCK_BYTES), st.binary(max_size=3 * BLOCK_BYTES))
def test_texts_share_as_many_blocks_as_they_begin_alike(same: bytes, one: bytes, other: bytes) -> None:
    first, second = blocks_of(same + one), blocks_of(same + other)
    alike = len(os.path.commonprefix([same + one, same + other])) // BLOCK_BYTES
    assert first[:alike] == second[:alike]
    assert len(first) == len(same + one) // BLOCK_BYTES
    for x, y in zip(first[alike:], second[alike:], strict=False):
        assert x != y


def test_the_same_block_elsewhere_is_another() -> None:
    assert blocks_of(A + B)[1] not in blocks_of(B + B)
    assert blocks_of(A + B)[1] != blocks_of(C + B)[1]


def test_only_a_beginning_of_bounded_length_counts() -> None:
    assert len(blocks_of(A * (MOST_BLOCKS + 10))) == MOST_BLOCKS
    assert blocks_of(b"") == blocks_of(A[:-1]) == []


@pytest.mark.parametrize(
    ("given_before", "asked", "load", "chosen"),
    [
        ({}, A, [0, 0], "x"),  # nobody knows anything: the first
        ({}, A, [1, 0], "y"),  # the least loaded
        ({"y": [A]}, A, [0, 3], "y"),  # who knows it, busier though it is
        ({"y": [A]}, B, [0, 3], "x"),
        ({"x": [A], "y": [A + B]}, A + B + C, [0, 3], "y"),  # who knows more of it
        ({"x": [A + B], "y": [A + B]}, A + B, [2, 1], "y"),  # as much: the least loaded
        ({"x": [B + A], "y": [A]}, A + B, [0, 5], "y"),  # the middle of another prompt is no beginning
        ({"x": [A[:-1]]}, A[:-1], [1, 0], "y"),  # shorter than a block: nothing to go by
    ],
)
def test_the_choice(given_before: dict[str, list[bytes]], asked: bytes, load: list[int], chosen: str) -> None:
    affinity = Affinity()
    for worker, prompts in given_before.items():
        for prompt in prompts:
            affinity.note(blocks_of(prompt), worker)
    assert affinity.choose(blocks_of(asked), ["x", "y"], load) == chosen


def test_only_free_instances_are_chosen() -> None:
    affinity = Affinity()
    affinity.note(blocks_of(A), "x")
    assert affinity.choose(blocks_of(A), ["y"], [7]) == "y"


def test_one_that_has_gone_is_forgotten() -> None:
    affinity = Affinity()
    affinity.note(blocks_of(A), "y")
    affinity.forget("y")
    affinity.forget("nobody")
    assert affinity.choose(blocks_of(A), ["x", "y"], [0, 0]) == "x"


def test_what_is_remembered_is_bounded_and_the_latest_stays() -> None:
    affinity = Affinity()
    latest = blocks_of(A + B)
    for number in range(2 * REMEMBERED // MOST_BLOCKS):
        affinity.note(blocks_of(number.to_bytes(BLOCK_BYTES, "big") * MOST_BLOCKS), "y")
        affinity.note(latest, "y")
    known = affinity._known["y"]
    assert len(known) == REMEMBERED
    assert sys.getsizeof(known) < 1 << 20
    assert affinity.choose(latest, ["x", "y"], [0, 9]) == "y"
    assert affinity.choose(blocks_of(bytes(BLOCK_BYTES)), ["x", "y"], [0, 9]) == "x", "the oldest is forgotten"
