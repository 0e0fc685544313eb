"""Keys, entries and the cache in memory, without a server."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from google.protobuf import text_format

from doorstep import proto
from doorstep.cache.base import copied_entry
from doorstep.cache.content import content_of
from doorstep.cache.key import KeyMaker
from doorstep.cache.local import LocalCache
from doorstep.cache.pack import pack_entry, unpack_entry
from doorstep.config.cache_options import LocalCacheOptions, RedisCacheOptions, cache_options, parse_cache_setting
from doorstep.config.model import ModelConfig
from doorstep.errors import InvalidArgument
from doorstep.request import InferenceRequest, InferenceResponse
from doorstep.types import BF16, BYTES, FP32, INT32, Tensor, object_array

CONFIG = """
name: "m" max_batch_size: 0
input { name: "a" data_type: TYPE_FP32 dims: [ -1 ] } input { name: "b" data_type: TYPE_STRING dims: [ -1 ] }
output { name: "y" data_type: TYPE_FP32 dims: [ -1 ] } output { name: "z" data_type: TYPE_FP32 dims: [ -1 ] }
"""


class Nobody:
    def send(self, response: InferenceResponse, final: bool) -> None: ...


def texts(*elements: bytes) -> Tensor:
    return Tensor("b", BYTES, object_array(elements, [len(elements)]))


def floats(*values: float) -> Tensor:
    return Tensor("a", FP32, np.array(values, np.float32))


def key(*tensors: Tensor, content: bytes = b"c", version: str = "1", **more: object) -> bytes:
    config = ModelConfig.from_proto(text_format.Parse(CONFIG, proto.ModelConfig()))
    request = InferenceRequest("m", {t.name: t for t in tensors}, Nobody(), **more)  # type: ignore[arg-type]
    return KeyMaker(config, version, lambda: content).key(request, content)


def test_the_order_of_inputs_is_no_matter() -> None:
    assert key(floats(1), texts(b"x")) == key(texts(b"x"), floats(1))
    assert key(floats(1), id="one") == key(floats(1), id="two")
    assert key(floats(1), requested_outputs=("z", "y")) == key(floats(1))


def test_whatever_differs_is_another_key() -> None:
    keys = [
        key(floats(1, 2)),
        key(floats(2, 1)),
        key(Tensor("a", FP32, np.array([[1, 2]], np.float32))),
        key(Tensor("a", INT32, np.array([1, 2], np.float32).view(np.int32))),
        key(floats(1, 2), content=b"d"),
        key(floats(1, 2), version="2"),
        key(floats(1, 2), requested_outputs=("y",)),
        key(floats(1, 2), parameters={"p": 1}),
        key(floats(1, 2), parameters={"p": "1"}),
        key(texts(b"ab", b"c")),
        key(texts(b"a", b"bc")),
        key(texts(b"a", b"bc", b"")),
        key(floats(1, 2), texts(b"a")),
        key(),
    ]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize(
    "tensor",
    [floats(1.5, -2), texts(b"", b"one", "zwölf".encode()), Tensor("h", BF16, np.ones((2, 0), BF16.numpy)), floats()],
)
def test_an_entry_survives_being_packed(tensor: Tensor) -> None:
    entry = copied_entry([tensor, Tensor("other", FP32, floats(7).array)], {"p": 1.5})
    found = unpack_entry(pack_entry(entry))
    assert found is not None
    assert found.parameters == {"p": 1.5}
    for before, after in zip(entry.outputs, found.outputs, strict=True):
        assert (before.name, before.datatype, before.shape) == (after.name, after.datatype, after.shape)
        assert before.array.tolist() == after.array.tolist()
        assert not after.array.flags.writeable


def test_what_was_not_packed_is_nothing() -> None:
    data = pack_entry(copied_entry([texts(b"one", b"two"), floats(1, 2)], None))
    for end in range(len(data)):
        assert unpack_entry(data[:end]) is None
    assert unpack_entry(data + b"x") is None
    for at in range(len(data)):
        unpack_entry(data[:at] + bytes((data[at] ^ 0xFF,)) + data[at + 1 :])  # whatever it is, it raises nothing


def test_an_entry_is_of_its_own() -> None:
    tensor = floats(1, 2)
    entry = copied_entry([tensor], None)
    tensor.array[0] = 9
    assert entry.outputs[0].array.tolist() == [1, 2]


def test_memory_is_bounded_and_the_least_recently_used_goes() -> None:
    entry = copied_entry([floats(*range(100))], None)
    cache = LocalCache(3 * entry.size)
    for name in (b"1", b"2", b"3"):
        assert cache.put(name, entry)
    assert not cache.put(b"3", entry), "it has that one"
    assert cache.get(b"1") is entry
    assert cache.put(b"4", entry)
    assert [name for name in (b"1", b"2", b"3", b"4") if cache.get(name) is None] == [b"2"]
    assert cache.usage() == (3, 1.0)
    assert cache.numbers.evictions == 1
    cache.put(b"5", copied_entry([floats(*range(1000))], None))
    assert cache.get(b"5") is None
    assert cache.usage() == (3, 1.0)


def test_content_changes_with_the_files_and_is_the_same_for_all_who_share(tmp_path: Path) -> None:
    message = text_format.Parse(CONFIG, proto.ModelConfig())
    (tmp_path / "model.py").write_text("one")
    first = content_of(message, tmp_path, shared=True)
    assert content_of(message, tmp_path, shared=True) == first
    assert content_of(message, tmp_path, shared=False) != content_of(message, tmp_path, shared=False)
    message.parameters["execution"].string_value = "inline"
    assert content_of(message, tmp_path, shared=True) == first
    (tmp_path / "model.py").write_text("two!")
    assert content_of(message, tmp_path, shared=True) != first


def parsed(*settings: str, **environment: str) -> object:
    return cache_options([parse_cache_setting(text) for text in settings], environment)


def test_settings() -> None:
    assert parsed() is None
    assert parsed("local,size=1024") == LocalCacheOptions(1024)
    found = parsed("redis,host=h", "redis,port=7", "redis,cacert=c", TRITONCACHE_REDIS_PASSWORD="p")
    assert found == RedisCacheOptions("h", 7, password="p", cacert="c", tls=True)
    assert "'p'" not in repr(found)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (["local"], "No cache specified"),
        (["local,size"], "option format is '<cache name>,<setting>=<value>'. Got local,size"),
        (["local,size=x"], "expected a whole number, 1 or more"),
        (["local,sise=1"], "unknown setting 'sise'"),
        (["local,size=1", "redis,host=h"], "only a single cache is currently supported"),
        (["disk,size=1"], "unknown cache 'disk'; expected local or redis"),
        (["redis,host=h"], "Must at a minimum specify 'host' and 'port'"),
        (["redis,host=h", "redis,port=1", "redis,tls_enabled=maybe"], "expected true or false"),
    ],
)
def test_wrong_settings_are_named(settings: list[str], text: str) -> None:
    with pytest.raises(InvalidArgument) as raised:
        parsed(*settings)
    assert text in str(raised.value)
