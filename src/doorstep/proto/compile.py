"""Makes descriptors.binpb from the .proto files; `make proto` runs it. Needs grpcio-tools, a developer's tool."""

from __future__ import annotations

import importlib
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
FILES = ("model_config.proto", "grpc_service.proto", "health.proto", "reflection.proto", "reflection_v1alpha.proto")
OUTPUT = HERE / "descriptors.binpb"


def compile_descriptors() -> bytes:
    """The serialised FileDescriptorSet of FILES, each after what it imports, without comments or positions."""
    protoc = importlib.import_module("grpc_tools.protoc")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / OUTPUT.name
        arguments = ["protoc", f"--proto_path={HERE}", "--include_imports", f"--descriptor_set_out={out}", *FILES]
        if protoc.main(arguments) != 0:
            raise SystemExit("protoc refused the .proto files (above)")
        return out.read_bytes()


def main() -> int:
    compiled = compile_descriptors()
    changed = not OUTPUT.exists() or OUTPUT.read_bytes() != compiled
    if changed:
        OUTPUT.write_bytes(compiled)
    print(f"{OUTPUT.name}: {'written' if changed else 'up to date'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
