"""The first lines of a worker process that runs in another Python than the server's: finds doorstep, and goes on there.

Knows nothing else, and is written for any Python 3: one that is too old must get as far as saying so.
"""

import importlib.util
import json
import os
import sys

OLDEST = (3, 11)
NEEDED = ("numpy", "ml_dtypes", "orjson", "google.protobuf")


def find_doorstep(told: dict) -> None:  # type: ignore[type-arg]
    # The script's own folder is first on the path, where `channel` and `output` would be found as modules.
    if sys.path and os.path.realpath(sys.path[0]) == os.path.realpath(os.path.dirname(__file__)):
        del sys.path[0]
    sys.path[:0] = told["first"]
    ours, theirs = tuple(sys.version_info[:2]), tuple(told["version"])
    if ours == theirs:
        sys.path.extend(path for path in told["last"] if path not in sys.path)
        return
    names = "Python %d.%d; the server's is %d.%d" % (*ours, *theirs)  # noqa: UP031
    if ours < OLDEST:
        sys.exit("the model's environment has " + names + ", and an environment needs at least Python 3.11")
    missing = [name for name in NEEDED if not _has(name)]
    if missing:
        pip = " ".join(name.replace("google.", "") for name in missing)
        sys.exit("the model's environment has " + names + ". Install in it: pip install " + pip)
    # Only our own package, which is plain Python: what lies beside it was built for another one.
    spec = importlib.util.spec_from_file_location(
        "doorstep", told["package"] + "/__init__.py", submodule_search_locations=[told["package"]]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["doorstep"] = module
    spec.loader.exec_module(module)


def _has(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:  # its parent is missing
        return False


if __name__ == "__main__":
    find_doorstep(json.loads(sys.argv[1]))
    from doorstep.workers.child import main

    main(*map(int, sys.argv[2:6]))
