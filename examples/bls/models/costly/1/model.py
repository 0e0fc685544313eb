"""Looks at every word; imagine something large here."""

import doorstep

WORDS = {"en": {"a", "is", "of", "the"}, "de": {"der", "die", "das", "ist"}, "fr": {"le", "la", "les", "est"}}


class Model(doorstep.Model):
    def predict(self, text: str) -> str:
        words = text.lower().split()
        return max(WORDS, key=lambda language: sum(word in WORDS[language] for word in words))
