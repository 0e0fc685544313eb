"""Reads a model's configuration: config.pbtxt, or the JSON of a load call. Knows no backend and completes nothing."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from google.protobuf import json_format, text_format

from doorstep import proto
from doorstep.config import legacy_json
from doorstep.config.survey import survey
from doorstep.errors import ConfigError, InvalidArgument, Problem

CONFIG_FILENAME = "config.pbtxt"
CUSTOM_CONFIGS = "configs"  # <model>/configs/<name>.pbtxt, chosen by --model-config-name

# protobuf's own words → what to do about it; the first that matches
_FIXES = (
    (r'Expected "[}>]"', "a bracket is never closed"),
    (r'Expected ","', "separate the items of a list with commas, and close it with ']'"),
    (r"Expected identifier", "there is one bracket too many before this, or something that is not a field"),
    (r"Expected string", "put text in double quotes"),
    (r"should not have multiple|is specified along with", "keep one of them"),
    (r"out of range", "the number does not fit the field"),
)


def config_path(model_directory: Path, config_name: str = "") -> Path:
    """The file to read: configs/<config_name>.pbtxt where it exists, else config.pbtxt, which may not."""
    if config_name:
        custom = model_directory / CUSTOM_CONFIGS / f"{config_name}.pbtxt"
        if custom.is_file():
            return custom
    return model_directory / CONFIG_FILENAME


def load_config(model_directory: Path, *, config_name: str = "", required: bool = False) -> Any:
    """The inference.ModelConfig message that the user wrote, not completed.

    Without a file it has only the name; with `required` (--disable-auto-complete-config) that is an error. Raises
    ConfigError with every problem found in the file.
    """
    path = config_path(model_directory, config_name)
    name = model_directory.name
    where = shown_path(path, model_directory)
    try:
        if not path.is_file() and path.exists():  # a pipe or a device may never end
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        text = path.read_bytes().decode()
    except FileNotFoundError as error:
        if not required:
            return proto.ModelConfig(name=name)
        what = f"failed to open text file for read {where}: {os.strerror(error.errno or 2)}"
        fix = "write one, or start the server without --disable-auto-complete-config"
        raise ConfigError(name, [Problem(where, what, fix)]) from None
    except OSError as error:
        what = f"failed to open text file for read {where}: {os.strerror(error.errno or 0)}"
        raise ConfigError(name, [Problem(where, what, "make it readable for the server's user")]) from None
    except UnicodeDecodeError as error:
        what = f"byte {error.start} is not UTF-8 text"
        raise ConfigError(name, [Problem(where, what, "save the file as UTF-8")]) from None
    return parse_text_config(text, name=name, where=where)


def shown_path(path: Path, model_directory: Path) -> str:
    """`path` as messages show it, from the model's directory on: `resnet/config.pbtxt`. Clients read these too."""
    return f"{model_directory.name}/{path.relative_to(model_directory).as_posix()}"


def parse_text_config(text: str, *, name: str, where: str = CONFIG_FILENAME) -> Any:
    """The message that `text` (protobuf text format) says. Raises ConfigError, each problem at `where:line:column`."""
    message = proto.ModelConfig()
    try:
        text_format.Parse(text, message)
    except text_format.ParseError as error:
        raise ConfigError(name, _parse_problems(text, error, where)) from None
    return message


def _parse_problems(text: str, error: text_format.ParseError, where: str) -> list[Problem]:
    found = survey(text, proto.ModelConfig.DESCRIPTOR)
    lines = text.split("\n")

    def problem(line: int, column: int, what: str, fix: str) -> Problem:
        quoted = lines[line - 1].strip() if 0 < line <= len(lines) else ""
        return Problem(f"{where}:{line}:{column}", what + (f" in `{quoted}`" if quoted else ""), fix)

    problems = [
        problem(f.line, f.column, f.what, f.fix) for f in sorted(found.faults, key=lambda f: (f.line, f.column))
    ]
    line, column = error.GetLine() or 1, error.GetColumn() or 1
    if not any(f.line == line for f in found.faults) and not found.faults:
        said = re.sub(r"^\d+:\d+ : ", "", str(error))
        said = re.sub(r"^'.*?': (?=[A-Z])", "", said, flags=re.DOTALL)  # the line, which is quoted below
        fix = next((fix for pattern, fix in _FIXES if re.search(pattern, said)), "")
        problems.append(problem(line, column, said.rstrip("."), fix))
    return problems


def locate(problems: Sequence[Problem], model_directory: Path, written: Any, config_name: str = "") -> list[Problem]:
    """The same problems, each field path with the file, line and column where it stands, in their order.

    `written` is the message they were found in: where it is not what the file says (an override), they stay as they
    are. Reads the file again, so it is for telling a person, not for every load.
    """
    path = config_path(model_directory, config_name)
    try:
        text = path.read_bytes().decode()
        if text_format.Parse(text, proto.ModelConfig()) != written:
            return list(problems)
    except FileNotFoundError:
        here = f"{model_directory.name}/"
        return [p if "/" in p.where else Problem(f"{here} {p.where}", p.what, p.fix) for p in problems]
    except (OSError, UnicodeDecodeError, text_format.ParseError):
        return list(problems)
    file = shown_path(path, model_directory)
    positions = survey(text, proto.ModelConfig.DESCRIPTOR)
    placed = []
    for problem in problems:
        at = None
        where = problem.where
        if not _is_file(where):
            at = positions.position(_field_path(where, written))
            where = f"{file}:{at[0]}:{at[1]} {where}" if at else f"{file} {where}"
        placed.append((at or (0, 0), Problem(where, problem.what, problem.fix)))
    return [problem for _, problem in sorted(placed, key=lambda pair: pair[0])]


def _is_file(where: str) -> bool:
    return "/" in where.split("[", maxsplit=1)[0]


def _field_path(where: str, written: Any) -> str:
    """Backends say `input 'x'` where they mean `input[0]`."""
    named = re.match(r"(input|output) '(.*)'", where)
    if named is None:
        return where
    names = [io.name for io in getattr(written, named[1])]
    return f"{named[1]}[{names.index(named[2])}]" if named[2] in names else named[1]


def parse_json_config(config: str | bytes | Mapping[str, Any], *, what: str = "Invalid config override") -> Any:
    """The message that Triton's JSON says: original field names, 64-bit integers as numbers or strings, enum names in
    any case. Raises InvalidArgument, beginning with `what`."""
    try:
        value = config if isinstance(config, Mapping) else legacy_json.parse(config)
        if not isinstance(value, Mapping):
            raise InvalidArgument(f"{what}: expected a JSON object, the configuration's fields by name")
        return json_format.ParseDict(_upper_enums(value, proto.ModelConfig.DESCRIPTOR, 0), proto.ModelConfig())
    except (json_format.ParseError, ValueError, RecursionError) as error:
        said = str(error).split("\n")[0]  # the second line lists every field in another spelling
        raise InvalidArgument(f"{what}: {said}") from None


def _upper_enums(value: Any, message: Any, depth: int) -> Any:
    """`type_fp32` as TYPE_FP32: Triton takes enum names in any case."""
    if not isinstance(value, Mapping) or depth > 64:
        return value
    upper = {}
    for name, content in value.items():
        field = message.fields_by_name.get(name) or message.fields_by_camelcase_name.get(name)
        if field is not None and field.enum_type is not None and isinstance(content, str):
            content = content.upper()
        elif field is not None and field.message_type is not None:
            inner = field.message_type
            if isinstance(content, list):
                content = [_upper_enums(item, inner, depth + 1) for item in content]
            elif inner.GetOptions().map_entry:
                of = inner.fields_by_name["value"].message_type
                if of is not None and isinstance(content, Mapping):
                    content = {key: _upper_enums(item, of, depth + 1) for key, item in content.items()}
            else:
                content = _upper_enums(content, inner, depth + 1)
        upper[name] = content
    return upper
