"""Reads the label files of a model's outputs, for classification. Knows no tensor."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from doorstep.errors import Problem


def read_labels(proto: Any, model_directory: Path) -> tuple[dict[str, tuple[str, ...]], list[Problem]]:
    """The lines of each output's label_filename, by output name; and what is wrong with those that cannot be read.

    A label's index is its line's number, counted from 0; lines may be empty.
    """
    labels: dict[str, tuple[str, ...]] = {}
    problems: list[Problem] = []
    root = model_directory.resolve()
    for i, output in enumerate(proto.output):
        if not output.label_filename:
            continue
        where = f"output[{i}].label_filename"
        shown = f"{model_directory.name}/{output.label_filename}"
        path = (model_directory / output.label_filename).resolve()
        if not path.is_relative_to(root):
            whose = f"output '{output.name}' in model '{proto.name}'"
            what = f"label file path '{shown}' for {whose} is outside model directory"
            problems.append(Problem(where, what, "put the file beside config.pbtxt"))
            continue
        try:
            text = path.read_bytes().decode()
        except OSError as error:
            what = f"failed to open text file for read {shown}: {os.strerror(error.errno or 0)}"
            problems.append(Problem(where, what, "put the file beside config.pbtxt, one label per line"))
        except UnicodeDecodeError as error:
            problems.append(Problem(where, f"{shown}: byte {error.start} is not UTF-8 text", "save the file as UTF-8"))
        else:
            lines = text.split("\n")
            if lines[-1] == "":
                lines.pop()
            labels[output.name] = tuple(line.removesuffix("\r") for line in lines)
    return labels, problems
