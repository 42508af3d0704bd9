"""Loads tiktoken's encodings from the files that litellm's distribution carries.

Owns one path, and one environment variable for the length of one call. Refuses the network: an encoding whose file is
not there is an error, not a download.
"""

from __future__ import annotations

import os
from hashlib import sha1
from importlib.util import find_spec
from pathlib import Path

import tiktoken

_SOURCE = "https://openaipublic.blob.core.windows.net/encodings/{}.tiktoken"
_VARIABLE = "TIKTOKEN_CACHE_DIR"
ENCODINGS = ("o200k_base", "cl100k_base", "p50k_base")


def load_encoding(name: str) -> tiktoken.Encoding:
    """One of `ENCODINGS`; 0.2 to 0.5 s at first, then tiktoken's own copy. Call it at start, from one thread.

    Raises ValueError for another name and FileNotFoundError where no file is found.
    """
    if name not in ENCODINGS:
        raise ValueError(f"no encoding {name!r} is carried; there are {', '.join(ENCODINGS)}")
    # tiktoken knows its files by the SHA-1 of the address they came from.
    file = sha1(_SOURCE.format(name).encode(), usedforsecurity=False).hexdigest()
    before = os.environ.get(_VARIABLE)
    folder = next((folder for folder in _folders(before) if (folder / file).is_file()), None)
    if folder is None:
        raise FileNotFoundError(
            f"no file of tiktoken's {name}: install litellm, or set {_VARIABLE} to a folder with {file}"
        )
    os.environ[_VARIABLE] = str(folder)
    try:
        return tiktoken.get_encoding(name)
    finally:
        if before is None:
            del os.environ[_VARIABLE]
        else:
            os.environ[_VARIABLE] = before


def _folders(configured: str | None) -> list[Path]:
    # find_spec finds litellm without importing it, which would take seconds.
    spec = find_spec("litellm")
    carried = [
        Path(place) / "litellm_core_utils" / "tokenizers" for place in (spec and spec.submodule_search_locations) or ()
    ]
    return [*([Path(configured)] if configured else []), *carried]
