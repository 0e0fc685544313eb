"""Heads of GGUF files, good and hostile: read, or refused in words and at no cost.

The format is ggml's docs/gguf.md; what damage can do elsewhere, CVE-2025-53630 and CVE-2026-27940."""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from doorstep.backends.llm.llamacpp.gguf import GgufHead, read_head
from doorstep.errors import BackendError

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
FORMS = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "?", U64: "Q", I64: "q", F64: "d"}


def text(value: str | bytes) -> bytes:
    data = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(data)) + data


def value(kind: int, what: Any) -> bytes:
    if kind == STRING:
        return text(what)
    if kind == ARRAY:
        inner, items = what
        return struct.pack("<IQ", inner, len(items)) + b"".join(value(inner, item) for item in items)
    return struct.pack(f"<{FORMS[kind]}", what)


def head(*pairs: tuple[str, int, Any], version: int = 3, tensors: int = 0, count: int | None = None) -> bytes:
    body = b"".join(text(key) + struct.pack("<I", kind) + value(kind, what) for key, kind, what in pairs)
    return b"GGUF" + struct.pack("<IQQ", version, tensors, len(pairs) if count is None else count) + body


ARCHITECTURE = ("general.architecture", STRING, "llama")
PAIRS: list[tuple[str, int, Any]] = [
    ARCHITECTURE,
    ("general.name", STRING, "Größe 🙂"),
    ("llama.context_length", U32, 8192),
    ("llama.rope", F32, 0.5),
    ("a.flag", BOOL, True),
    ("a.u8", U8, 255),
    ("a.i8", I8, -1),
    ("a.u16", U16, 65535),
    ("a.i16", I16, -2),
    ("a.i32", I32, -3),
    ("a.u64", U64, 2**64 - 1),
    ("a.i64", I64, -(2**63)),
    ("a.f64", F64, 1e300),
    ("tokenizer.ggml.tokens", ARRAY, (STRING, ["<s>", "", "é"])),
    ("tokenizer.ggml.scores", ARRAY, (F32, [0.0, -1.0])),
    ("a.empty", ARRAY, (U8, [])),
    ("tokenizer.chat_template", STRING, "{{ messages }}"),
]
# Two rows of four FP32 numbers at the beginning of the data, which is aligned to 32 bytes
TENSOR = text("w") + struct.pack("<IQQIQ", 2, 4, 2, 0, 0)
DATA = bytes(32)
UNTIL_DATA = head(*PAIRS, tensors=1) + TENSOR
UNTIL_DATA += bytes(-len(UNTIL_DATA) % 32)
GOOD = UNTIL_DATA + DATA


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gguf")


def read(folder: Path, data: bytes) -> GgufHead:
    path = folder / "model.gguf"
    path.write_bytes(data)
    return read_head(path)


def refused(folder: Path, data: bytes) -> str:
    with pytest.raises(BackendError) as caught:
        read(folder, data)
    message = caught.value.message
    assert "model.gguf" in message
    assert str(folder) not in message
    return message


@pytest.mark.parametrize("version", [2, 3])
def test_a_head_is_read_and_arrays_are_counted(folder: Path, version: int) -> None:
    found = read(folder, head(*PAIRS, version=version, tensors=1) + TENSOR + bytes(64))
    assert found.pairs == {key: (what[0], len(what[1])) if kind == ARRAY else what for key, kind, what in PAIRS}
    assert (found.tensor_count, found.architecture, found.name) == (1, "llama", "Größe 🙂")
    assert (found.context_length, found.chat_template) == (8192, "{{ messages }}")
    assert (found.count("tokenizer.ggml.tokens"), found.count("nothing"), found.count("a.flag")) == (3, 0, 0)


@pytest.mark.parametrize(
    ("pairs", "task"),
    [
        ([ARCHITECTURE], "generate"),
        ([ARCHITECTURE, ("llama.pooling_type", U32, 0)], "generate"),
        ([ARCHITECTURE, ("llama.pooling_type", U32, 1)], "embed"),
        ([ARCHITECTURE, ("llama.pooling_type", U32, 4)], "rerank"),
        ([("general.architecture", STRING, "bert")], "embed"),
    ],
)
def test_what_a_model_is_for(folder: Path, pairs: Any, task: str) -> None:
    assert read(folder, head(*pairs)).task == task


def test_a_real_model_says_what_llama_cpp_says(smollm2: Path) -> None:
    """SmolLM2's own page: llama's architecture, 49,152 tokens, 8,192 of context."""
    found = read_head(smollm2)
    assert (found.architecture, found.context_length, found.count("tokenizer.ggml.tokens")) == ("llama", 8192, 49152)
    assert found.task == "generate"
    assert "<|im_start|>" in found.chat_template


# Damage


@pytest.mark.parametrize("length", range(len(head(*PAIRS))))
def test_a_file_that_ends_anywhere_in_its_head_is_refused(folder: Path, length: int) -> None:
    message = refused(folder, GOOD[:length])
    assert "is damaged" in message


@pytest.mark.parametrize("missing", [1, 31, 32])
def test_a_file_that_ends_in_its_tensors_is_refused(folder: Path, missing: int) -> None:
    message = refused(folder, GOOD[:-missing])
    assert f"has {len(GOOD) - missing} bytes, and its tensor 'w' ends at {len(GOOD)}" in message


@pytest.mark.parametrize(
    "tensor",
    [
        text("w") + struct.pack("<I", 2**31),  # dimensions
        text("w") + struct.pack("<IQQIQ", 2, 2**63, 2**63, 0, 0),
        text("w") + struct.pack("<IQIQ", 1, 1, 0, 2**63),
    ],
)
def test_a_tensor_that_lies_is_refused(folder: Path, tensor: bytes) -> None:
    assert "is damaged" in refused(folder, head(*PAIRS, tensors=1) + tensor + bytes(64))


HUGE = [2**31, 2**32, 2**40, 2**63 - 1, 2**63, 2**64 - 1]


@pytest.mark.parametrize("count", HUGE)
@pytest.mark.parametrize(
    "hostile",
    [
        lambda n: b"GGUF" + struct.pack("<IQQ", 3, n, 0),  # tensors
        lambda n: b"GGUF" + struct.pack("<IQQ", 3, 0, n),  # pairs
        lambda n: head(count=1) + struct.pack("<Q", n),  # a key
        lambda n: head(count=1) + text("k") + struct.pack("<IQ", STRING, n),  # a text
        lambda n: head(count=1) + text("k") + struct.pack("<IIQ", ARRAY, U8, n),
        lambda n: head(count=1) + text("k") + struct.pack("<IIQ", ARRAY, F64, n),  # n times 8 overflows
        lambda n: head(count=1) + text("k") + struct.pack("<IIQ", ARRAY, STRING, n),
        lambda n: head(count=1) + text("k") + struct.pack("<IIQQ", ARRAY, STRING, 1, n),  # a text in a list
    ],
)
def test_a_length_that_lies_is_refused_and_costs_nothing(folder: Path, hostile: Any, count: int) -> None:
    data = hostile(count) + bytes(4096)
    tracemalloc.start()
    try:
        refused(folder, data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "ends too early"),
        (b"GGUF", "ends too early"),
        (b"GGML" + bytes(100), "does not begin with 'GGUF'"),
        (b"\x00" * 1000, "does not begin with 'GGUF'"),
        (b"PK\x03\x04" + bytes(100), "does not begin with 'GGUF'"),
        (head(ARCHITECTURE, version=1), "version 1"),
        (head(ARCHITECTURE, version=4), "version 4"),
        (head(ARCHITECTURE, version=0x03000000), "version"),  # big-endian
        (head(), "does not say its architecture"),
        (head(("general.architecture", STRING, "")), "does not say its architecture"),
        (head(count=1) + text("k") + struct.pack("<I", 13), "type 13"),
        (head(count=1) + text("k") + struct.pack("<I", 2**32 - 1), "type 4294967295"),
        (head(count=1) + text("k") + struct.pack("<IIQ", ARRAY, ARRAY, 1) + bytes(100), "a list of type 9"),
        (head(count=1) + text("k") + struct.pack("<IIQ", ARRAY, 77, 0), "a list of type 77"),
    ],
)
def test_what_is_no_model_is_told_in_words(folder: Path, data: bytes, said: str) -> None:
    assert said in refused(folder, data)


def test_a_file_that_is_not_there_is_told(folder: Path) -> None:
    with pytest.raises(BackendError, match="cannot be read"):
        read_head(folder / "nothing.gguf")
    with pytest.raises(BackendError, match="cannot be read"):
        read_head(folder)


@pytest.mark.parametrize(
    ("key", "what"),
    [("general.architecture", (U32, 5)), ("general.architecture", (ARRAY, (U8, [1]))),
     ("llama.context_length", (STRING, "many")), ("llama.context_length", (F32, 1.5)),
     ("llama.context_length", (U64, 2**64 - 1)), ("general.name", (BOOL, True)),
     ("tokenizer.chat_template", (ARRAY, (STRING, ["a"])))],
)  # fmt: skip
def test_entries_of_another_type_than_expected_do_no_harm(folder: Path, key: str, what: Any) -> None:
    found = read(folder, head(ARCHITECTURE, (key, *what)))
    assert isinstance(found.architecture, str)
    assert isinstance(found.context_length, int)
    assert found.task == "generate"
    assert isinstance(found.name, str)
    assert isinstance(found.chat_template, str)


def test_a_text_that_is_no_text_is_read_as_far_as_it_is(folder: Path) -> None:
    assert read(folder, head(ARCHITECTURE, ("general.name", STRING, b"a\xff\xfeb"))).name == "a\ufffd\ufffdb"


QUICK = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=200)


@QUICK
@given(st.data())
def test_a_file_with_any_bytes_changed_is_a_head_or_refused(folder: Path, data: st.DataObject) -> None:
    changed = bytearray(GOOD)
    for at in data.draw(st.lists(st.integers(0, len(changed) - 1), min_size=1, max_size=6)):
        changed[at] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(changed)))
    for mutated in (bytes(changed), bytes(changed[:cut])):
        try:
            found = read(folder, mutated)
        except BackendError:
            continue
        assert found.architecture


@QUICK
@given(st.binary(max_size=200))
def test_any_bytes_are_a_head_or_refused(folder: Path, data: bytes) -> None:
    for mutated in (data, b"GGUF\x03\x00\x00\x00" + data):
        try:
            found = read(folder, mutated)
        except BackendError:
            continue
        assert found.architecture
