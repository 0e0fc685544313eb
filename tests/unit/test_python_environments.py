"""Environments of models: real ones, made here, and archives that mean harm."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import tarfile
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest

from doorstep import proto
from doorstep.backends.python import archive, requirements
from doorstep.backends.python.archive import unpack, unpacked
from doorstep.backends.python.environments import environment_of
from doorstep.errors import DoorstepError
from doorstep.testing.python_models import PythonModel

WHERE = """
import os, sys
import numpy as np
import triton_python_backend_utils as pb_utils
class TritonPythonModel:
    def execute(self, requests):
        import only_here
        text = f"{only_here.VALUE} {sys.prefix}"
        return [pb_utils.InferenceResponse([pb_utils.Tensor("Y", np.array([text.encode()], np.object_))])]
"""
CONFIG = """
input { name: "X" data_type: TYPE_INT32 dims: 1 }
output { name: "Y" data_type: TYPE_STRING dims: 1 }
"""


def config(path: str = "") -> object:
    message = proto.ModelConfig(name="m")
    if path:
        message.parameters["EXECUTION_ENV_PATH"].string_value = path
    return message


def ask(served: PythonModel) -> str:
    return served(X=np.array([1], np.int32))["Y"][0].decode()


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> Path:
    """With files of its own for a Python, as conda-pack's have, and a package that is nowhere else."""
    folder = tmp_path_factory.mktemp("made") / "env"
    subprocess.run([sys.executable, "-m", "venv", "--copies", "--without-pip", folder], check=True)
    (packages,) = folder.glob("lib/python3*/site-packages")
    (packages / "only_here.py").write_text("VALUE = 'packed'\n")
    return folder


@pytest.fixture(scope="module")
def packed(environment) -> Path:
    path = environment.parent / "env.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for entry in sorted(environment.iterdir()):
            tar.add(entry, entry.name)
    return path


def test_a_model_runs_in_a_packed_environment_that_is_unpacked_once(tmp_path, packed):
    folder = tmp_path / "m"
    folder.mkdir()
    shutil.copy(packed, folder / "env.tar.gz")
    cache = tmp_path / "cache"
    text = (
        CONFIG
        + 'parameters { key: "EXECUTION_ENV_PATH" value { string_value: "$$TRITON_MODEL_DIRECTORY/env.tar.gz" } }'
    )
    settings = {"environment-directory": str(cache)}
    with PythonModel(folder, WHERE, config=text, settings=settings) as served:
        (unpacked_at,) = (d for d in cache.iterdir() if d.is_dir())
        assert ask(served) == f"packed {unpacked_at}"
    before = os.stat(unpacked_at / "pyvenv.cfg").st_ino
    with PythonModel(folder, WHERE, config=text, settings=settings) as served:
        assert ask(served).startswith("packed ")
    assert os.stat(unpacked_at / "pyvenv.cfg").st_ino == before


def test_a_model_runs_in_the_environment_of_a_folder(tmp_path, environment):
    text = CONFIG + f'parameters {{ key: "EXECUTION_ENV_PATH" value {{ string_value: "{environment}" }} }}'
    with PythonModel(tmp_path / "m", WHERE, config=text) as served:
        assert ask(served) == f"packed {environment}"


@pytest.mark.parametrize(("path", "text"), [("/nope/env.tar.gz", "Failed to get the canonical path for /nope"),
                                            ("/tmp", "is no Python environment: it has no bin/python")])  # fmt: skip
def test_an_environment_that_is_none_is_refused(tmp_path, path, text):
    with pytest.raises(DoorstepError, match=text):
        environment_of(config(path), tmp_path, tmp_path / "1", {})


def wheel(folder: Path) -> None:
    with zipfile.ZipFile(folder / "only_here-1.0-py3-none-any.whl", "w") as file:
        file.writestr("only_here.py", "VALUE = 'built'\n")
        info = "only_here-1.0.dist-info"
        file.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: only-here\nVersion: 1.0\n")
        file.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        file.writestr(f"{info}/RECORD", "")


OFFLINE = "--no-index\n--find-links .\n"


def test_a_requirements_file_beside_the_model_is_built_once(tmp_path, caplog):
    folder = tmp_path / "m"
    folder.mkdir()
    wheel(folder)
    (folder / "requirements.txt").write_text(OFFLINE + "only-here==1.0\n")
    settings = {"environment-directory": str(tmp_path / "cache")}
    with (
        caplog.at_level("INFO", "doorstep.model"),
        PythonModel(folder, WHERE, config=CONFIG, settings=settings) as served,
    ):
        assert ask(served).startswith("built ")
    assert any("Successfully installed only-here-1.0" in line for line in caplog.messages)
    caplog.clear()
    assert environment_of(config(), folder, folder / "1", settings) is not None
    assert not caplog.messages


def test_loads_at_the_same_time_share_one_build(tmp_path, monkeypatch):
    (tmp_path / "requirements.txt").write_text("x")
    built = []
    monkeypatch.setattr(requirements, "_build", lambda file, folder: built.append(folder))
    cache, results = tmp_path / "cache", []
    threads = [
        threading.Thread(target=lambda: results.append(requirements.built(tmp_path / "requirements.txt", cache)))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1
    assert set(results) == set(built)


def test_what_pip_says_last_is_in_the_error_and_nothing_stays(tmp_path):
    (tmp_path / "requirements.txt").write_text(OFFLINE + "no-such-package-anywhere\n")
    cache = tmp_path / "cache"
    with pytest.raises(DoorstepError, match=r"pip cannot install .*No matching distribution found"):
        environment_of(config(), tmp_path, tmp_path / "1", {"environment-directory": str(cache)})
    assert not [d for d in cache.iterdir() if d.is_dir()]


def test_nothing_is_built_where_it_is_switched_off_or_the_files_were_uploaded(tmp_path):
    (tmp_path / "requirements.txt").write_text("x")
    assert environment_of(config(), tmp_path, tmp_path / "1", {"build-environments": "false"}) is None
    uploaded = tmp_path / "doorstep-override-abc" / "m"
    uploaded.mkdir(parents=True)
    (uploaded / "requirements.txt").write_text("x")
    assert environment_of(config(), uploaded, uploaded / "1", {}) is None
    with pytest.raises(DoorstepError, match="expected true or false"):
        environment_of(config(), tmp_path, tmp_path / "1", {"build-environments": "maybe"})


def member(
    name: str, kind: bytes = tarfile.REGTYPE, link: str = "", data: bytes = b"x"
) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    info.size = len(data) if kind == tarfile.REGTYPE else 0
    return info, data


HOSTILE = {
    "a path upwards": [member("../escaped")],
    "an absolute path": [member("/tmp/doorstep-escaped")],
    "a path up behind a folder": [member("a/../../escaped")],
    "a link out": [member("bin", tarfile.SYMTYPE, "../..")],
    "an absolute link": [member("bin", tarfile.SYMTYPE, "/etc")],
    "a write through a link": [member("d", tarfile.DIRTYPE), member("l", tarfile.SYMTYPE, "d"), member("l/f")],
    "links that lead out together": [
        member("a/b", tarfile.DIRTYPE), member("a/b/up", tarfile.SYMTYPE, "../.."),
        member("a/x", tarfile.SYMTYPE, "b/up/.."),
    ],
    "a hard link out": [member("h", tarfile.LNKTYPE, "../../etc/passwd")],
    "a hard link to a link": [member("f"), member("l", tarfile.SYMTYPE, "f"), member("h", tarfile.LNKTYPE, "l")],
    "a device": [member("null", tarfile.CHRTYPE)],
    "a pipe": [member("pipe", tarfile.FIFOTYPE)],
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_an_archive_that_means_harm_is_refused_and_leaves_nothing(tmp_path, what):
    path, cache = tmp_path / "evil.tar.gz", tmp_path / "cache"
    with tarfile.open(path, "w:gz") as tar:
        for info, data in HOSTILE[what]:
            tar.addfile(info, io.BytesIO(data))
    with pytest.raises(DoorstepError):
        unpacked(path, cache)
    assert not [entry for entry in cache.iterdir() if entry.is_dir()]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["cache", "evil.tar.gz"]


@pytest.mark.parametrize("bound", [{"largest": 100}, {"most": 3}])
def test_what_an_archive_unpacks_to_is_bounded(tmp_path, bound):
    with tarfile.open(tmp_path / "big.tar.gz", "w:gz") as tar:
        for number in range(5):
            info, data = member(str(number), data=bytes(50))
            tar.addfile(info, io.BytesIO(data))
    with pytest.raises(DoorstepError, match="with it the archive has over"):
        unpack(tmp_path / "big.tar.gz", tmp_path, **bound)


def test_a_file_that_is_no_archive_says_so(tmp_path):
    (tmp_path / "env.tar.gz").write_bytes(b"no archive at all")
    with pytest.raises(DoorstepError, match=r"env.tar.gz cannot be unpacked"):
        unpacked(tmp_path / "env.tar.gz", tmp_path / "cache")


def test_links_within_the_archive_are_kept(tmp_path):
    with tarfile.open(tmp_path / "good.tar", "w") as tar:
        for info, data in (member("./lib/a", data=b"A"), member("lib64", tarfile.SYMTYPE, "lib"),
                           member("b", tarfile.LNKTYPE, "./lib/a")):  # fmt: skip
            tar.addfile(info, io.BytesIO(data))
    folder = unpacked(tmp_path / "good.tar", tmp_path / "cache")
    assert (folder / "lib64" / "a").read_bytes() == (folder / "b").read_bytes() == b"A"
    assert archive.LARGEST_BYTES > 10 << 30
