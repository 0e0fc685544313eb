"""Tokens that become text: whole characters, stop strings, what is told of them; and what requests may ask."""

from __future__ import annotations

import random
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from doorstep.backends.llm.hf.text import Answer, Detokeniser, TokenNames
from doorstep.backends.llm.hf.wishes import Wishes, stops_of, wishes_of
from doorstep.errors import InvalidArgument

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


class ByteTokenizer:
    """A token per byte, by the character that GPT-2's tokenizers write for it; 256 is special."""

    def __init__(self) -> None:
        core = Tokenizer(models.BPE({char: i for i, char in enumerate(ALPHABET)}, []))
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        core.add_special_tokens(["<end>"])
        self.backend_tokenizer = core

    def encode(self, text: str) -> list[int]:
        return list(self.backend_tokenizer.encode(text).ids)

    def decode(
        self, tokens: list[int], skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool = True
    ) -> str:
        return str(self.backend_tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens))

    def convert_ids_to_tokens(self, token: int) -> str:
        return str(self.backend_tokenizer.id_to_token(token))


TOKENIZER = ByteTokenizer()
WORDS = "naïve 東京 🦊, done"


def pieces(tokens: list[int], prompt: str = "") -> list[str]:
    made = Detokeniser(TOKENIZER, TOKENIZER.encode(prompt))
    return [*(made.feed(token) for token in tokens), made.finish()]


@pytest.mark.parametrize("prompt", ["", "ask", "ends in half a character: 東"])
def test_no_piece_has_half_a_character(prompt: str) -> None:
    found = pieces(TOKENIZER.encode(WORDS), prompt)
    assert "".join(found) == WORDS
    assert [piece for piece in found if piece] == list(WORDS)


def test_what_is_no_text_is_what_the_tokenizer_makes_of_it() -> None:
    numbers = random.Random(5)
    for length in (1, 2, 3, 30, 200):
        for _ in range(20):
            tokens = [numbers.randrange(257) for _ in range(length)]
            assert "".join(pieces(tokens)) == TOKENIZER.decode(tokens, skip_special_tokens=True)


def test_an_answer_that_ends_in_half_a_character_says_so() -> None:
    tokens = TOKENIZER.encode("a東")[:-1]
    found = pieces(tokens)
    assert found[0] == "a"
    assert "".join(found) == TOKENIZER.decode(tokens)


def told(text: str, stops: list[str], *, logprobs: bool = False) -> tuple[list[str], Answer, list[Any], int]:
    answer = Answer(TOKENIZER, [], stops)
    deltas = []
    for i, token in enumerate(TOKENIZER.encode(text)):
        deltas.append(answer.feed(token, {"at": i} if logprobs else None))
        if answer.stopped:
            break
    deltas.append(answer.finish())
    given = [delta for delta in deltas if delta is not None]
    entries = [entry["at"] for delta in given for entry in delta.logprobs or ()]
    return [delta.text for delta in given], answer, entries, sum(delta.tokens for delta in given)


@pytest.mark.parametrize(
    ("text", "stops", "said", "stopped"),
    [
        ("one two", [], "one two", False),
        ("one two", ["two"], "one ", True),
        ("one two", ["zzz", "e t"], "on", True),
        ("aaab", ["aab"], "a", True),
        ("one tw", ["two"], "one tw", False),
        ("東京 京都", ["京都"], "東京 ", True),
        ("xab", ["ab", "b"], "x", True),
    ],
)
def test_an_answer_is_cut_before_a_stop_string_and_gives_nothing_of_it(
    text: str, stops: list[str], said: str, stopped: bool
) -> None:
    found, answer, _, _ = told(text, stops)
    assert "".join(found) == said
    assert answer.stopped is stopped


def test_every_token_counts_and_only_those_of_the_answer_are_told_of() -> None:
    _, _, entries, tokens = told("one two!", ["two"], logprobs=True)
    assert entries == [0, 1, 2, 3]
    assert tokens == 7
    _, _, entries, tokens = told("東 tw", ["two"], logprobs=True)
    assert (entries, tokens) == (list(range(6)), 6)


def test_a_token_that_is_part_of_a_character_is_told_by_its_bytes() -> None:
    names = TokenNames(TOKENIZER)
    tokens = TOKENIZER.encode("東 ")
    entries = [names.entry(token, -0.5, [(token, -0.5)]) for token in tokens]
    assert bytes(byte for entry in entries for byte in entry["bytes"]) == "東 ".encode()
    space = {"id": tokens[-1], "token": " ", "logprob": -0.5, "bytes": [32]}
    assert entries[-1] == {**space, "top_logprobs": [space]}
    assert names.entry(3, float("-inf"), [])["logprob"] == -9999.0


# Wishes


def wishes(body: dict[str, Any], *, chat: bool = True, usual: dict[str, float] | None = None) -> Wishes:
    return wishes_of(body, chat=chat, left=100, vocabulary=50, ends=frozenset((7,)), usual=usual or {})


def test_what_is_not_said_is_as_the_model_has_it_and_else_neutral() -> None:
    assert wishes({}) == Wishes(most=100, ends=frozenset((7,)))
    usual = {"temperature": 0.6, "top_k": 20.0}
    assert wishes({}, usual=usual) == Wishes(temperature=0.6, top_k=20, most=100, ends=frozenset((7,)))
    assert wishes({"temperature": 0, "top_k": -1}, usual=usual) == Wishes(temperature=0, most=100, ends=frozenset((7,)))


@pytest.mark.parametrize(
    ("body", "chat", "count"),
    [
        ({}, True, -1),
        ({"logprobs": False, "top_logprobs": 3}, True, -1),
        ({"logprobs": True}, True, 0),
        ({"logprobs": True, "top_logprobs": 3}, True, 3),
        ({}, False, -1),
        ({"logprobs": 0}, False, 0),
        ({"logprobs": 5}, False, 5),
    ],
)
def test_chats_and_completions_ask_for_log_probabilities_in_their_own_ways(
    body: dict[str, Any], chat: bool, count: int
) -> None:
    assert wishes(body, chat=chat).logprobs == count


def test_no_more_is_generated_than_there_is_room_for() -> None:
    assert wishes({"max_tokens": 5}).most == 5
    assert wishes({"max_tokens": 10**9, "min_tokens": 10**9}).most == 100
    assert wishes({"min_tokens": 10**9}).least == 100
    assert wishes({"ignore_eos": True}).ends == frozenset()


@pytest.mark.parametrize(
    "body",
    [
        {"temperature": float("nan")},
        {"temperature": True},
        {"top_p": "0.5"},
        {"top_k": 1.5},
        {"max_tokens": 0},
        {"ignore_eos": 1},
        {"logit_bias": {"50": 1}},
        {"logit_bias": {"x": 1}},
        {"logit_bias": {"1": "x"}},
        {"n_discard": -1},
    ],
)
def test_what_is_out_of_range_or_unknown_is_refused(body: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument):
        wishes(body)


def test_stops_are_texts() -> None:
    assert stops_of({}) == []
    assert stops_of({"stop": "x"}) == ["x"]
    assert stops_of({"stop": ["x", "y"]}) == ["x", "y"]
    for wrong in ([""], [1], 5):
        with pytest.raises(InvalidArgument):
            stops_of({"stop": wrong})
