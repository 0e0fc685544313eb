"""`doorstep check MODELS/`: what is wrong with each model, and how to mend it. Loads no model, runs no user code."""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from doorstep import proto as messages
from doorstep.backends.base import CompletionContext
from doorstep.backends.python.environments import MODEL_DIRECTORY, PARAMETER, lacking_environment
from doorstep.backends.table import backend_names, find_backend
from doorstep.config.check import check
from doorstep.config.check_ensemble_graph import check_ensemble_graph
from doorstep.config.complete import ENSEMBLE, normalise
from doorstep.config.load import load_config, locate
from doorstep.config.prepare import check_written
from doorstep.config.support import fields_without_meaning
from doorstep.errors import ConfigError, DoorstepError, Problem
from doorstep.repository.agents import check_agents
from doorstep.repository.base import VersionSpec
from doorstep.repository.dependencies import Dependencies
from doorstep.repository.layout import mistaken, without_models, without_versions
from doorstep.repository.source import FoundModel, Source
from doorstep.repository.version_policy import choose, policy_of

DESCRIPTION = "Checks every model in the folders without loading any. Exits 0 if all is well, 1 if not."


@dataclass(slots=True)
class Report:
    """What there is to say about one model."""

    name: str
    directory: Path
    backend: str = ""
    versions: tuple[int, ...] = ()  # those that would be served
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    config: Any = None  # the inference.ModelConfig message, as far as it is known


def run(argv: Sequence[str], prog: str = "doorstep check") -> int:
    parser = argparse.ArgumentParser(prog=prog, description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("models", nargs="+", metavar="MODELS", type=Path, help="a folder of models")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument("--model-config-name", default="", metavar="NAME", help="as given to `doorstep serve`")
    parser.add_argument("--disable-auto-complete-config", action="store_true", help="as given to `doorstep serve`")
    given = parser.parse_args(argv)
    problems, reports = check_repositories(
        given.models, config_name=given.model_config_name, complete=not given.disable_auto_complete_config
    )
    if given.json:
        sys.stdout.buffer.write(orjson.dumps(_as_json(problems, reports), option=orjson.OPT_INDENT_2) + b"\n")
        sys.stdout.flush()
    else:
        print(_as_text(problems, reports))
    return 1 if problems or any(report.problems for report in reports) else 0


def check_repositories(
    repositories: Sequence[Path], *, config_name: str = "", complete: bool = True
) -> tuple[list[Problem], list[Report]]:
    """(what is wrong with the folders themselves, a report per model)."""
    problems = [problem for path in repositories if (problem := mistaken(path)) is not None]
    if problems:
        return problems, []
    listing = Source(repositories).scan()
    problems = [Problem(str(path), why, "name a folder of models") for path, why in listing.unlisted.items()]
    problems += [Problem(name, error.message) for name, error in listing.problems.items()]
    if not problems:
        problems = [problem for path in repositories if (problem := without_models(path)) is not None]
    names = backend_names()
    reports = [check_model(m, names, config_name=config_name, complete=complete) for m in listing.models.values()]
    by_name = {report.name: report for report in reports}
    dependencies = Dependencies()
    for report in reports:
        if report.config is not None:
            dependencies.note(report.name, report.config)
    for report in reports:
        if circle := dependencies.cycle(report.name, lambda _, name: name):
            report.problems.append(Problem("ensemble_scheduling", circle))
        report.problems += _check_steps(report, by_name)
    return problems, reports


def _check_steps(report: Report, reports: Mapping[str, Report]) -> list[Problem]:
    """Whether an ensemble's models are there and fit, as far as that is known before they are loaded."""
    if report.problems or report.config is None or not report.config.ensemble_scheduling.step:
        return []
    steps = report.config.ensemble_scheduling.step
    missing = sorted({step.model_name for step in steps} - reports.keys())
    if missing:
        what = f"ensemble {report.name} contains models that are not available or ambiguous: {', '.join(missing)}"
        return [Problem("ensemble_scheduling", what, "put them beside it")]
    configs = {("", step.model_name): reports[step.model_name].config for step in steps}
    if any(config is None or not _is_complete(config) for config in configs.values()):
        note = "whether its steps fit is seen when their models are loaded"
        report.notes.append(note)
        return []
    graph = messages.ModelConfig()
    graph.CopyFrom(report.config)
    return list(check_ensemble_graph(graph, configs))


def _is_complete(config: Any) -> bool:
    tensors = (*config.input, *config.output)
    return bool(config.input and config.output) and all(t.data_type and t.dims for t in tensors)


def check_model(model: FoundModel, backends: Sequence[str], *, config_name: str = "", complete: bool = True) -> Report:
    report = Report(model.name, model.directory)
    try:
        written = load_config(model.directory, config_name=config_name, required=not complete)
    except ConfigError as error:
        report.problems += error.problems
        return report
    report.notes += fields_without_meaning(written)
    report.notes += [f"folder {name} is no version: it has a leading zero" for name in model.ignored]
    report.versions, absent = choose(policy_of(written), model.versions)
    found: dict[str, Problem] = {}  # by text, since most are the same for every version
    for version in absent:
        what = f"version {version} is specified for model '{model.name}', but the version directory is not present"
        _add(found, Problem("version_policy", what, f"make {model.name}/{version}/, or take it out of the policy"))
    try:
        check_agents(written, model.directory)
    except DoorstepError as error:
        _add(found, Problem("model_repository_agents", error.message))
    if not model.versions:
        is_ensemble = written.platform == ENSEMBLE or written.HasField("ensemble_scheduling")
        fix = without_versions(model.directory, is_ensemble=is_ensemble)
        _add(found, Problem(f"{model.name}/", f"failed to load '{model.name}', no version is available", fix))
    for version in report.versions or (1,):
        spec = VersionSpec(model.name, str(version), model.directory, model.directory / str(version), written)
        for problem in _check_version(spec, report, backends, complete=complete, there=bool(report.versions)):
            _add(found, problem)
    report.problems += locate(list(found.values()), model.directory, written, config_name)
    return report


def _add(found: dict[str, Problem], problem: Problem) -> None:
    found.setdefault(problem.what, problem)


def _check_version(
    spec: VersionSpec, report: Report, backends: Sequence[str], *, complete: bool, there: bool
) -> list[Problem]:
    proto, problems = check_written(spec, complete=complete, backends=backends)
    if not there:  # said already, and more to the point
        problems = [p for p in problems if not (p.where == "backend" and not proto.backend)]
    report.backend = proto.backend or proto.platform
    report.config = proto
    if not there or proto.backend not in backends:
        return problems
    try:
        backend = find_backend(proto.backend)
        if backend.models_are_code:
            return problems + _check_environment(spec, proto) + _check_code(spec, proto, report)
        if not complete:
            return problems
        backend.complete_config(proto, spec.model_directory, spec.version_directory, CompletionContext())
    except ConfigError as error:
        return [*problems, *error.problems]
    except DoorstepError as error:
        return [*problems, Problem(f"{spec.name}/{spec.version}/", error.message)]
    normalise(proto)
    return problems + check(proto, directory_name=spec.name)


def _check_environment(spec: VersionSpec, proto: Any) -> list[Problem]:
    """The Python a model brings along is where its config says."""
    lacking = lacking_environment(proto, spec.model_directory)
    if not lacking:
        return []
    fix = f"{MODEL_DIRECTORY} stands for the model's folder; without the parameter the server's Python runs the model"
    return [Problem(f'parameters["{PARAMETER}"]', f"there is no environment at {lacking}", fix)]


def _check_code(spec: VersionSpec, proto: Any, report: Report) -> list[Problem]:
    """For backends whose model is code: the file is there, and Python can read it. It is not run."""
    shown = f"{spec.name}/{spec.version}/{proto.default_model_filename}"
    path = spec.version_directory / proto.default_model_filename
    if not proto.default_model_filename or not path.exists():
        what = f"unable to find '{proto.default_model_filename}' for model '{spec.name}'"
        return [Problem(shown, what, "put it there, or set default_model_filename in config.pbtxt")]
    open_fields = [name for name in ("input", "output") if not getattr(proto, name)]
    open_fields += [
        f"{io.name}'s data_type or dims" for io in (*proto.input, *proto.output) if not io.data_type or not io.dims
    ]
    if open_fields:
        note = f"{', '.join(open_fields)}: filled in from {proto.default_model_filename} when the model is loaded"
        if note not in report.notes:
            report.notes.append(note)
    if path.suffix == ".py":
        try:
            ast.parse(path.read_bytes(), filename=shown)
        except SyntaxError as error:
            return [Problem(f"{shown}:{error.lineno}:{error.offset}", f"Python cannot read it: {error.msg}")]
        except (OSError, ValueError) as error:
            return [Problem(shown, f"Python cannot read it: {error}")]
    return []


def _as_json(problems: list[Problem], reports: list[Report]) -> dict[str, Any]:
    def listed(of: list[Problem]) -> list[dict[str, str]]:
        return [{"where": p.where, "what": p.what, "fix": p.fix} for p in of]

    return {
        "ok": not problems and not any(r.problems for r in reports),
        "problems": listed(problems),
        "models": [
            {
                "name": r.name,
                "directory": str(r.directory),
                "backend": r.backend,
                "versions": list(r.versions),
                "ok": not r.problems,
                "problems": listed(r.problems),
                "notes": r.notes,
            }
            for r in reports
        ],
    }


def _as_text(problems: list[Problem], reports: list[Report]) -> str:
    lines: list[str] = []
    for problem in problems:
        lines += _problem_lines(problem, "")
    for report in reports:
        versions = ", ".join(map(str, report.versions))
        about = ", ".join(filter(None, (report.backend, f"version {versions}" if versions else "")))
        verdict = "ok" if not report.problems else _count(len(report.problems), "problem")
        lines.append(f"{report.name}: {verdict}" + (f" ({about})" if about else ""))
        repository = f"{_short(report.directory.parent)}/"
        for problem in report.problems:
            lines += [f"  {line}" for line in _problem_lines(problem, repository, report.name)]
        lines += [f"  note: {note}" for note in report.notes]
    bad = sum(1 for report in reports if report.problems)
    outcome = "all ok" if not bad else f"{bad} with problems"
    if reports:
        lines += ["", f"{_count(len(reports), 'model')} checked, {outcome}"]
    return "\n".join(lines)


def _problem_lines(problem: Problem, repository: str, name: str = "") -> list[str]:
    where = problem.where
    if name and where.startswith(f"{name}/"):
        where = repository + where
    lines = [where, f"  {problem.what}"]
    if problem.fix:
        lines.append(f"  fix: {problem.fix}")
    return lines


def _short(path: Path) -> str:
    """Relative to where the person is, if it is below."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")
