"""Reading Hugging Face folders: what they say, and what is wrong with those that lie."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from doorstep.backends.llm.hf.folder import read_folder
from doorstep.errors import BackendError

CONFIG: dict[str, Any] = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "max_position_embeddings": 2048}


def safetensors(data: bytes = bytes(8), header: dict[str, Any] | None = None) -> bytes:
    """One tensor, as the format's documentation has it."""
    said = json.dumps(header or {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    return struct.pack("<Q", len(said)) + said + data


def folder(path: Path, config: object = CONFIG, **files: object) -> Path:
    (path / "config.json").write_text(json.dumps(config))
    (path / "model.safetensors").write_bytes(safetensors())
    for name, content in files.items():
        (path / name.replace("_json", ".json")).write_text(json.dumps(content))
    return path


def test_what_a_folder_says_of_its_model(tmp_path: Path) -> None:
    generation = {"eos_token_id": [2, 7], "temperature": 0.6, "top_p": 0.9, "do_sample": True, "top_k": None}
    folder(tmp_path, CONFIG | {"eos_token_id": 5}, generation_config_json=generation)
    for path in (tmp_path, tmp_path / "config.json"):
        found = read_folder(path)
        assert (found.path, found.architecture, found.context_length) == (tmp_path, "LlamaForCausalLM", 2048)
        assert (found.task, found.ends) == ("generate", frozenset((2, 7)))
        assert found.sampling == {"temperature": 0.6, "top_p": 0.9}


@pytest.mark.parametrize(
    ("config", "context", "ends"),
    [
        ({"n_positions": 1024, "eos_token_id": 5}, 1024, {5}),
        ({"text_config": {"max_position_embeddings": 99, "eos_token_id": 3}}, 99, {3}),
        ({"max_position_embeddings": -1}, 0, set()),
        ({"max_position_embeddings": "many", "eos_token_id": [1, -1, "x"]}, 0, {1}),
    ],
)
def test_context_and_ends_are_found_wherever_they_are_said(
    tmp_path: Path, config: dict[str, Any], context: int, ends: set[int]
) -> None:
    found = read_folder(folder(tmp_path, {"model_type": "x", **config}))
    assert (found.context_length, found.ends) == (context, ends)


@pytest.mark.parametrize(
    ("architecture", "task"),
    [
        ("Qwen3ForCausalLM", "generate"),
        ("GPT2LMHeadModel", "generate"),
        ("BertModel", "embed"),
        ("XLMRobertaForMaskedLM", "embed"),
        ("BertForSequenceClassification", "rerank"),
    ],
)
def test_the_task_is_what_the_class_is_for(tmp_path: Path, architecture: str, task: str) -> None:
    assert read_folder(folder(tmp_path, CONFIG | {"architectures": [architecture]})).task == task


def test_a_folder_of_sentence_transformers_embeds_whatever_its_class(tmp_path: Path) -> None:
    found = read_folder(folder(tmp_path, modules_json=[]))
    assert (found.task, found.pooling) == ("embed", "mean")
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(
        json.dumps({"pooling_mode_cls_token": False, "pooling_mode_lasttoken": True})
    )
    assert read_folder(tmp_path).pooling == "last"


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ([1], "config.json is not a JSON object"),
        ({"architectures": ["LlamaForCausalLM"]}, "does not say its model_type"),
        (CONFIG | {"is_encoder_decoder": True}, "encoder-decoder"),
        (CONFIG | {"architectures": ["BertForTokenClassification"]}, "neither generates nor embeds nor reranks"),
    ],
)
def test_what_cannot_be_served_is_said(tmp_path: Path, config: object, why: str) -> None:
    with pytest.raises(BackendError, match=why):
        read_folder(folder(tmp_path, config))


def test_a_config_that_is_no_json_is_named(tmp_path: Path) -> None:
    folder(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": ')
    with pytest.raises(BackendError, match=r"config\.json is not JSON"):
        read_folder(tmp_path)


def test_an_empty_folder_is_told_what_belongs_there(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"there is no config\.json: put the model's whole folder there"):
        read_folder(tmp_path)


def test_pickles_are_no_weights(tmp_path: Path) -> None:
    folder(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(BackendError, match=r"no weights in"):
        read_folder(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    with pytest.raises(BackendError, match=r"pickles that run code when they are read; save them as safetensors"):
        read_folder(tmp_path)


WHOLE = safetensors()


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "it has 0 bytes"),
        (WHOLE[:5], "it has 5 bytes"),
        (WHOLE[:20], "its header claims"),
        (struct.pack("<Q", 2**63) + WHOLE[8:], "its header claims"),
        (WHOLE[:-1], "its tensors claim 8 bytes, and it has 7"),
        (WHOLE + b"x", "its tensors claim 8 bytes, and it has 9"),
        (struct.pack("<Q", 4) + b"{{{{", "its header is not JSON"),
        (struct.pack("<Q", 2) + b"[]", "its header is not a JSON object"),
        (safetensors(header={"w": {"data_offsets": [8, 0]}}), "where the tensor 'w' is"),
        (safetensors(header={"w": {"data_offsets": "all"}}), "where the tensor 'w' is"),
        (safetensors(header={"w": 3}), "where the tensor 'w' is"),
        (safetensors(header={"w": {"data_offsets": [0, 2**60]}}), "its tensors claim"),
    ],
)
def test_weights_that_are_damaged_are_told_before_they_are_loaded(tmp_path: Path, content: bytes, why: str) -> None:
    folder(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(BackendError, match=rf"model\.safetensors is damaged: {why}"):
        read_folder(tmp_path)


def test_every_part_that_the_index_names_must_be_there(tmp_path: Path) -> None:
    folder(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BackendError, match=r"names model-00002-of-00002\.safetensors, which is not there"):
        read_folder(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(WHOLE)
    assert read_folder(tmp_path).task == "generate"
