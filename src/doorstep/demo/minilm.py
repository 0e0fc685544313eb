"""A sentence's meaning as 384 numbers: all-MiniLM-L6-v2. `doorstep demo` writes this file as minilm/1/model.py.

Text in, unit vector out: the dot product of two embeddings says how near two sentences are, 1 (the same) to about 0.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
import onnxruntime

import doorstep
from doorstep.demo.wordpiece import WordPiece

MAX_TOKENS = 256  # what the model was trained to read; the rest of a longer text is ignored


class Model(doorstep.Model):
    max_batch_size = 32
    outputs = {"embedding": Annotated[npt.NDArray[np.float32], (384,)]}

    def load(self) -> None:
        files = Path(__file__).parent
        vocabulary = (files / "vocab.txt").read_text(encoding="utf-8").splitlines()
        self.tokenizer = WordPiece(vocabulary, max_tokens=MAX_TOKENS)
        self.session = onnxruntime.InferenceSession(files / "minilm.onnx", providers=["CPUExecutionProvider"])

    def predict(self, text: list[str]) -> dict[str, npt.NDArray[np.float32]]:
        rows = [self.tokenizer.encode(sentence) for sentence in text]
        ids = np.zeros((len(rows), max(map(len, rows))), np.int64)  # 0 is [PAD]
        mask = np.zeros_like(ids)
        for row, tokens in enumerate(rows):
            ids[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = 1
        inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        hidden = self.session.run(["last_hidden_state"], inputs)[0]  # (batch, tokens, 384)

        weights = mask[:, :, None].astype(np.float32)
        mean = (hidden * weights).sum(axis=1) / weights.sum(axis=1)
        return {"embedding": mean / np.linalg.norm(mean, axis=1, keepdims=True)}
