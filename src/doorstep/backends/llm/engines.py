"""The engines there are: a row each. Imports none of their libraries."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from doorstep.backends.llm.hf.folder import read_folder
from doorstep.backends.llm.llamacpp.gguf import read_head
from doorstep.backends.llm.openvino.files import survey as openvino_survey
from doorstep.backends.llm.vllm.args import survey as vllm_survey


@dataclass(frozen=True, slots=True)
class Facts:
    """What a model's files say of it."""

    context_length: int = 0  # tokens; 0: they do not say
    task: str = "generate"
    said: Mapping[str, str] = field(default_factory=dict)  # parameters of the config, where that leaves them out


@dataclass(frozen=True, slots=True)
class EngineRow:
    module: str
    attribute: str  # the LLMEngine in it
    install: str  # what pip installs where its library is missing
    filename: str  # the model's file in a version's folder, where the config names no other
    facts: Callable[[Path], Facts]  # of that file; raises DoorstepError. Loads nothing


def _gguf(path: Path) -> Facts:
    head = read_head(path)
    return Facts(head.context_length, head.task)


def _folder(path: Path) -> Facts:
    folder = read_folder(path)
    return Facts(folder.context_length, folder.task)


def _vllm(path: Path) -> Facts:
    found = vllm_survey(path)
    return Facts(task=found.task, said=found.said)


def _openvino(path: Path) -> Facts:
    return Facts(openvino_survey(path).context_length)


_HERE = "doorstep.backends.llm"
ENGINES: dict[str, EngineRow] = {
    "llamacpp": EngineRow(f"{_HERE}.llamacpp.engine", "LlamaCppEngine", "xllamacpp", "model.gguf", _gguf),
    "transformers": EngineRow(
        f"{_HERE}.hf.engine", "TransformersEngine", "doorstep[transformers]", "config.json", _folder
    ),
    "vllm": EngineRow(f"{_HERE}.vllm.engine", "VllmEngine", "doorstep[vllm]", "model.json", _vllm),
    "openvino": EngineRow(
        f"{_HERE}.openvino.engine", "OpenVinoEngine", "doorstep[openvino]", "openvino_model.xml", _openvino
    ),
}
