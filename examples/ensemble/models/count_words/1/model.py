"""The second step: how often each word is there, the most frequent first."""

from collections import Counter

import doorstep


class Model(doorstep.Model):
    outputs = {"word": list[str], "times": list[int]}

    def predict(self, words: list[str]) -> dict[str, list[str] | list[int]]:
        counted = Counter(words).most_common()
        return {"word": [word for word, _ in counted], "times": [times for _, times in counted]}
