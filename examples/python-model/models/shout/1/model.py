"""The smallest model: its type hints say that text goes in and text comes out."""

import doorstep


class Model(doorstep.Model):
    def predict(self, text: list[str]) -> list[str]:
        return [t.upper() for t in text]
