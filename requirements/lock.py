"""Resolves all dependencies together and writes the lock files beside this one. Run through `make lock`.

gateway.txt, build.txt and dev.txt are locked by hash; engine.txt by version, because torch's CPU and CUDA builds have
different hashes. An image knows which of them it holds: engine-cpu.txt and engine-cuda.txt are locked by hash.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
PROJECT = HERE.parent / "pyproject.toml"

# Newer litellm needs a certifi that is not everywhere; torch's newest build may be CUDA-only on some indexes.
PINNED = ["litellm==1.106.2", "torch==2.13.0", "transformers==5.23.0", "bitsandbytes==0.50.2"]

# torch's CPU build for CPython 3.11 on x86-64, which is not on PyPI but on the index that engine.Dockerfile names.
TORCH_CPU = """\
torch==2.13.0+cpu \\
    --hash=sha256:6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b"""

HEADINGS = {
    "gateway": "# The gateway and all it needs, by hash.",
    "build": "# What builds and installs the package, by hash.",
    "dev": "# Tests and linters, on top of gateway.txt, by hash.",
    "engine": "# The engine, on top of gateway.txt, by version: torch's CPU and CUDA builds have different hashes.",
    "engine-cpu": "# All that an engine's image needs, with torch for CPUs, by hash.",
    "engine-cuda": "# All that an engine's image needs, with torch for CUDA, by hash.",
}


def resolve(*arguments: str) -> dict[str, str]:
    """Package name to its lines of a resolution, hashes included."""
    command = ["uv", "pip", "compile", "--quiet", "--no-header", "--no-annotate", "--python-version", "3.11"]
    command = [str(Path(sys.executable).parent / command[0]), *command[1:]]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
        constraints.write("\n".join(PINNED))
        constraints.flush()
        text = subprocess.run(  # noqa: S603 - our own arguments
            [*command, *arguments, "--constraint", constraints.name], check=True, capture_output=True, text=True
        ).stdout
    blocks: dict[str, str] = {}
    for line in text.splitlines():
        if match := re.match(r"([a-zA-Z0-9._-]+)==", line):
            name = match.group(1)
            blocks[name] = line
        elif line.strip():
            blocks[name] += f"\n{line}"
    return blocks


def write(name: str, blocks: dict[str, str]) -> None:
    """One lock file."""
    text = "\n".join([f"{HEADINGS[name]} Made by `make lock`.", *blocks.values()])
    (HERE / f"{name}.txt").write_text(text + "\n")
    sys.stdout.write(f"requirements/{name}.txt: {len(blocks)} packages\n")


def main() -> None:
    """Resolve and write all files."""
    gateway = resolve(str(PROJECT), "--generate-hashes")
    dev = resolve("--group", f"{PROJECT}:dev", "--generate-hashes", "--constraint", str(HERE / "gateway.txt"))
    engine = resolve(str(PROJECT), "--extra", "engine")
    build_in = HERE / "build.in"
    build = resolve(str(build_in), "--generate-hashes")
    write("gateway", gateway)
    write("build", {name: lines for name, lines in build.items() if name not in gateway})
    write("dev", {name: lines for name, lines in dev.items() if name not in gateway and name not in build})
    # A CUDA build names its own NVIDIA packages; a CPU build has none.
    cuda = re.compile(r"nvidia|cuda|triton")
    write("engine", {n: lines for n, lines in engine.items() if n not in gateway and not cuda.match(n)})
    versions = [argument for name in ("gateway", "engine") for argument in ("--constraint", str(HERE / f"{name}.txt"))]
    image = resolve(str(HERE / "engine-image.in"), "--generate-hashes", *versions)
    write("engine-cuda", image)
    on_cpu = {name: lines for name, lines in image.items() if not cuda.match(name)}
    write("engine-cpu", {**on_cpu, "torch": TORCH_CPU})


if __name__ == "__main__":
    main()
