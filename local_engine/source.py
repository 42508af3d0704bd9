"""Owns what a model's name means: the bundled model, a directory, or a Hugging Face id; refuses to load anything.

Apart from loading.py because it needs no torch: a mistyped path is known at once, not after seconds of imports.
"""

from __future__ import annotations

from pathlib import Path

from local_engine.errors import LoadError

DEMO = "demo"
DEMO_DRAFT = "demo-draft"


def model_source(model: str) -> str:
    """The directory or Hugging Face id that `model` names. Raises LoadError where the directory holds no model."""
    if model == DEMO:
        return _checked(Path(__file__).parent / "demo_model", "reinstall hybridgate, its bundled model is incomplete")
    if model == DEMO_DRAFT:
        return _checked(
            Path(__file__).parent / "demo_model" / "draft", "reinstall hybridgate, its bundled draft is incomplete"
        )
    path = Path(model).expanduser()
    if path.is_dir():
        return _checked(path, "convert the weights to safetensors, or name another model")
    if path.is_absolute() or model.startswith((".", "~")) or path.exists() or model.count("/") > 1:
        raise LoadError(f"{model} is not a directory: give the directory of a model, a Hugging Face id, or `{DEMO}`")
    return model


def _checked(directory: Path, fix: str) -> str:
    if not (directory / "config.json").is_file():
        raise LoadError(f"{directory} holds no config.json, so it is no model directory: {fix}")
    if not any(directory.glob("*.safetensors")):
        raise LoadError(f"{directory} holds no *.safetensors, the only weight format that is read: {fix}")
    return str(directory)
