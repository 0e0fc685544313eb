"""What --backend-config says, by backend; and Triton's settings that mean nothing here. Knows no backend's own."""

from __future__ import annotations

from collections.abc import Sequence

from doorstep.errors import InvalidArgument

SETTING = "default-max-batch-size"
_GROWS = "shared memory is taken as tensors need it"
# (backend, setting) → why nothing comes of it
WITHOUT_EFFECT = {
    ("python", "shm-default-byte-size"): _GROWS,
    ("python", "shm-growth-byte-size"): _GROWS,
    ("python", "shm-region-prefix-name"): "the workers' shared memory has no names",
    ("onnxruntime", "enable-global-threadpool"): "each session has threads of its own",
}


def backend_settings(settings: Sequence[tuple[str, str, str]], notes: list[str]) -> dict[str, dict[str, str]]:
    """Backend, "" for all of them → key → value; the last one counts. Raises InvalidArgument for a bad batch size."""
    config: dict[str, dict[str, str]] = {}
    for backend, key, value in settings:
        config.setdefault(backend, {})[key] = value
        if why := WITHOUT_EFFECT.get((backend, key)):
            notes.append(f"--backend-config={backend},{key}={value} has no effect: {why}")
    for backend, known in config.items():
        size = known.get(SETTING, "0")
        if not size.isdecimal():
            shown = f"{backend},{SETTING}={size}".lstrip(",")
            raise InvalidArgument(f"--backend-config={shown}: expected a whole number, 0 or more")
    return config
