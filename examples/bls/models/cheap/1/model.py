"""A guess from the first letter, and how sure it is."""

from typing import NamedTuple

import doorstep


class Guess(NamedTuple):
    language: str
    sure: float


class Model(doorstep.Model):
    def predict(self, text: str) -> Guess:
        return Guess("en", 0.9) if text.lower().startswith("the ") else Guess("?", 0.1)
