"""Which ensemble needs which models, and why one cannot be served now. Knows no disk and no loading.

Models are known by their identity: the name, with the namespace in front where there are namespaces. Texts are Triton's
(model_repository_manager.cc).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

SEPARATOR = "::"


def identity(namespace: str, name: str) -> str:
    return f"{namespace}{SEPARATOR}{name}" if namespace else name


def split(model: str) -> tuple[str, str]:
    """(namespace, name) of an identity."""
    namespace, separator, name = model.rpartition(SEPARATOR)
    return (namespace, name) if separator else ("", model)


@dataclass(frozen=True, slots=True)
class Needed:
    """What is known of a model that an ensemble needs."""

    versions: Collection[int]  # those that are served
    problem: str = ""  # why there is none
    invalid: bool = False  # an ensemble that itself lacks something


class Dependencies:
    """The ensembles that are to be served, by what their configs say. Touched only from the event loop."""

    def __init__(self) -> None:
        self._steps: dict[str, tuple[tuple[str, int], ...]] = {}  # ensemble → (model's name, version) of each step
        self._generations: dict[str, int] = {}  # how often what is served of a model has changed

    def note(self, model: str, config: Any) -> None:
        """The config of a model, as it is now; one that is no ensemble needs nothing."""
        steps = tuple((step.model_name, step.model_version) for step in config.ensemble_scheduling.step)
        if steps:
            self._steps[model] = steps
        else:
            self._steps.pop(model, None)

    def forget(self, model: str) -> None:
        self._steps.pop(model, None)

    def names_needed_by(self, model: str) -> list[str]:
        """Names, not identities: which is meant is known when all are there."""
        return list(dict.fromkeys(name for name, _ in self._steps.get(model, ())))

    def that_need(self, model: str, among: Collection[str]) -> list[str]:
        """The ensembles, of `among`, with a step of this model's name."""
        _, name = split(model)
        return [e for e in sorted(self._steps) if e in among and name in self.names_needed_by(e) and e != model]

    def all_that_need(self, model: str, among: Collection[str]) -> list[str]:
        """And those that need these, nearest first."""
        found: dict[str, None] = {}
        look = [model]
        while look:
            for ensemble in self.that_need(look.pop(0), among):
                if ensemble not in found:
                    found[ensemble] = None
                    look.append(ensemble)
        return list(found)

    def changed(self, model: str) -> None:
        """Other versions of it are served, or none."""
        self._generations[model] = self._generations.get(model, 0) + 1

    def generation(self, models: Iterable[str]) -> str:
        """Equal as long as nothing that is served of these has changed."""
        return ",".join(f"{model}@{self._generations.get(model, 0)}" for model in models)

    def cycle(self, ensemble: str, resolve: Callable[[str, str], str]) -> str:
        """Triton's words where the ensemble needs itself, else nothing."""

        def needs_it(model: str, seen: set[str]) -> str:
            for name in self.names_needed_by(model):
                needed = resolve(model, name)
                if needed == ensemble:
                    return model
                if needed not in seen:
                    seen.add(needed)
                    if found := needs_it(needed, seen):
                        return found
            return ""

        last = needs_it(ensemble, set())
        return f"circular dependency between ensembles: {ensemble} -> ... -> {last} -> {ensemble}" if last else ""

    def problem(self, ensemble: str, needed: Callable[[str], Needed | None], resolve: Callable[[str, str], str]) -> str:
        """Why the ensemble cannot be served now, or nothing. `needed` gives None for a model that nobody wants."""
        if text := self.cycle(ensemble, resolve):
            return text
        missing = []
        known: dict[str, Needed] = {}
        for name in self.names_needed_by(ensemble):
            found = needed(resolve(ensemble, name))
            if found is None:
                missing.append(name)
            else:
                known[resolve(ensemble, name)] = found
        if missing:
            names = ", ".join(sorted(missing))
            return f"ensemble {ensemble} contains models that are not available or ambiguous: {names}"
        problems = []
        for model, state in known.items():
            start = f"ensemble '{ensemble}' depends on '{model}'"
            if state.invalid:
                problems.append(f"{start} which is not valid. Model '{model}' failed with error: {state.problem}")
            elif not state.versions:
                why = f" Model '{model}' loading failed with error: {state.problem}" if state.problem else ""
                problems.append(f"{start} which has no loaded version.{why}")
        for name, version in self._steps.get(ensemble, ()):
            model = resolve(ensemble, name)
            if version >= 0 and known[model].versions and version not in known[model].versions:
                problems.append(
                    f"ensemble '{ensemble}' depends on '{model}' whose required version {version} is not loaded."
                )
        return " ".join(dict.fromkeys(problems))
