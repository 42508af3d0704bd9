"""Volumes as the kubelet makes them: ConfigMaps and Secrets behind a link that is swapped, and empty folders."""

from __future__ import annotations

import base64
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def contents(held: Mapping[str, Any]) -> dict[str, bytes]:
    """The files of a ConfigMap or Secret."""
    files = {str(name): str(text).encode() for name, text in held.get("stringData", {}).items()}
    if held.get("kind") == "Secret":
        return {name: base64.b64decode(str(text)) for name, text in held.get("data", {}).items()} | files
    return {name: str(text).encode() for name, text in held.get("data", {}).items()}


def write(folder: Path, files: Mapping[str, bytes]) -> None:
    """Let the folder hold these files, all of them at once: each name is a link to `..data/NAME`, `..data` is one to a
    folder that is named after the time, and is replaced by renaming (as kubernetes' AtomicWriter does)."""
    now = time.time()
    stamp = time.strftime("..%Y_%m_%d_%H_%M_%S", time.gmtime(now)) + f".{int(now * 1e9) % 10**10:010d}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / stamp).mkdir()
    for name, content in files.items():
        (folder / stamp / name).write_bytes(content)
    data = folder / "..data"
    before = os.readlink(data) if data.is_symlink() else None
    (folder / "..data_tmp").symlink_to(stamp)
    (folder / "..data_tmp").rename(data)
    for name in files:
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(f"..data/{name}")
    for link in folder.iterdir():
        if not link.name.startswith("..") and link.name not in files:
            link.unlink()
    if before is not None:
        shutil.rmtree(folder / before)


def empty(folder: Path) -> None:
    """A folder that everybody may write to, as an emptyDir is."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o777)
