"""The first step: a text into its words."""

import doorstep


class Model(doorstep.Model):
    outputs = {"words": list[str]}

    def predict(self, text: str) -> dict[str, list[str]]:
        return {"words": text.lower().split()}
