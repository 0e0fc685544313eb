"""What kind of file some bytes are: Google's Magika. `doorstep demo` writes this file as magika/1/model.py.

Gives the labels that the `magika` package gives in its default mode: a doubtful answer becomes `txt` or `unknown`.
Takes one file at a time, because this network's scores depend a little on what else is in a batch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt
import onnxruntime

import doorstep


class Answer(TypedDict):
    score: float
    mime_type: str
    label: str


class Model(doorstep.Model):
    def load(self) -> None:
        files = Path(__file__).parent
        self.config: dict[str, Any] = json.loads((files / "config.json").read_text())
        self.types: dict[str, dict[str, Any]] = json.loads((files / "content_types.json").read_text())
        self.session = onnxruntime.InferenceSession(files / "magika.onnx", providers=["CPUExecutionProvider"])

    def predict(self, file: bytes) -> Answer:
        label, score = self.short_label(file), 1.0
        if not label:
            scores = self.session.run(["target_label"], {"bytes": self.features(file)[None]})[0][0]  # (labels,)
            best = int(scores.argmax())
            score = float(scores[best])
            label = self.label(self.config["target_labels_space"][best], score)
        return {"score": score, "mime_type": self.mime_type(label), "label": label}

    def features(self, content: bytes) -> npt.NDArray[np.int32]:
        """The first and the last bytes that are not white space, padded in the middle."""
        config = self.config
        first, last = config["beg_size"], config["end_size"]
        padded = np.full(first + last, config["padding_token"], np.int32)
        beginning = content[: config["block_size"]].lstrip()[:first]
        end = content[-config["block_size"] :].rstrip()[-last:]
        padded[: len(beginning)] = np.frombuffer(beginning, np.uint8)
        padded[len(padded) - len(end) :] = np.frombuffer(end, np.uint8)
        return padded

    def short_label(self, content: bytes) -> str:
        """The label of what is too short for the network; "" when it is not."""
        if not content:
            return "empty"
        beginning = content[: self.config["block_size"]]
        if len(beginning.lstrip()) >= self.config["min_file_size_for_dl"]:
            return ""
        try:
            beginning.decode()
        except UnicodeDecodeError:
            return "unknown"
        return "txt"

    def label(self, guess: str, score: float) -> str:
        """The network's guess, or a general label where it is not sure enough."""
        config = self.config
        label = str(config["overwrite_map"].get(guess, guess))
        if score >= config["thresholds"].get(guess, config["medium_confidence_threshold"]):
            return label
        return "txt" if self.types[label]["is_text"] else "unknown"

    def mime_type(self, label: str) -> str:
        known = self.types[label]
        return str(known["mime_type"] or ("text/plain" if known["is_text"] else "application/octet-stream"))
