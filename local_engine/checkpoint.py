"""Owns the question whether a checkpoint's files hold what its configuration promises; refuses to load models.

transformers fills what is missing with random numbers and casts whatever it finds, each with a warning at most; both
would be served as if nothing were wrong.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import safe_open
from transformers import AutoConfig
from transformers.utils import cached_file

from local_engine.errors import LoadError

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
NUMBERS = frozenset({"F64", "F32", "F16", "BF16"})
"""Types of weights that are the numbers themselves; of others, a quantization has to say what they stand for."""

WAY_OUT = "serve it with vLLM or SGLang, and name that as a deployment with `backend: openai`"
FETCH = "fetch the checkpoint again, whole"
SHOWN = 3


def configuration(source: str, model: str) -> Any:
    """The model's configuration. Raises LoadError where a value cannot be one, and what transformers raises where there
    is none."""
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (AttributeError, TypeError, StrictDataclassError) as error:
        said = " ".join(str(error).split())
        raise LoadError(f"the config.json of {model} has a value that cannot be right: {said}") from error
    except ValueError as error:
        if "custom code" not in str(error):
            raise
        raise LoadError(f"{model} brings code of its own, which is never run: {WAY_OUT}") from error


def check_shards(source: str, model: str) -> None:
    """Refuse a directory in which a file is missing that its index names. Raises LoadError."""
    directory = Path(source)
    index = directory / INDEX
    if not index.is_file() or (directory / WHOLE).is_file():
        return
    try:
        wanted = set(json.loads(index.read_text())["weight_map"].values())
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise LoadError(f"the {INDEX} of {model} cannot be read: {FETCH}") from error
    if missing := sorted(name for name in wanted if not (directory / name).is_file()):
        raise LoadError(f"{model} lacks {len(missing)} of {len(wanted)} shards: {_some(missing)}; {FETCH}")


def check_loaded(told: Mapping[str, Any], model: str) -> None:
    """Refuse what transformers would have filled with random numbers; `told` is its account of the load. Raises
    LoadError."""
    if missing := sorted(told["missing_keys"]):
        raise LoadError(f"the files of {model} lack {len(missing)} of its weights: {_some(missing)}; {FETCH}")
    if other := sorted(told["mismatched_keys"]):
        name, stored, wanted = other[0]
        raise LoadError(
            f"{len(other)} weights of {model} have other sizes than its config.json says, such as {name} with "
            f"{list(stored)} instead of {list(wanted)}: {FETCH}, or repair config.json"
        )


def check_types(source: str, model: str) -> None:
    """Refuse weights that stand for other numbers than they are, with nothing that says for which. Call it for a
    checkpoint that names no quantization, once its files are here. Raises LoadError."""
    for file in _files(source):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - no mapping
                kind = tensors.get_slice(name).get_dtype()
                if kind not in NUMBERS and name.endswith("weight"):
                    raise LoadError(
                        f"{model} stores {name} as {kind}, and its config.json has no quantization_config that says "
                        "what that means: name the checkpoint in bfloat16, float16 or float32, or one with it"
                    )


def _files(source: str) -> Iterator[str]:
    """The files of weights, on this machine."""
    for name in (WHOLE, INDEX):
        try:
            found = cached_file(source, name, local_files_only=True)
        except OSError:
            continue
        if found is None:
            continue
        if name == WHOLE:
            yield found
        else:
            for shard in sorted(set(json.loads(Path(found).read_text())["weight_map"].values())):
                yield str(Path(found).parent / shard)
        return


def _some(names: list[str]) -> str:
    rest = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + rest
