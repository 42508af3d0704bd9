"""Owns how much memory a model will take, before its weights are read; refuses to load them.

Weights are counted over the model's own modules, made without memory: what bitsandbytes quantizes (linear layers but
the output's) and what it leaves alone. Activations are an estimate, of the largest tensors of a full step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from local_engine.checkpoint import configuration
from local_engine.config import DEFAULT_WINDOWS, QUANTIZATIONS, Settings
from local_engine.errors import LoadError
from local_engine.linear import copied_bytes
from local_engine.loading import (
    CPU_CACHE_SHARE,
    CUDA_CACHE_SHARE,
    WAY_OUT,
    check_architecture,
    dtype_of,
    free_bytes,
    kv_bytes_per_token,
    kv_heads,
    window_of,
)
from local_engine.rows import bucket_sizes
from local_engine.source import model_source

INT4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""A weight in NF4 with double quantization: four bits, a byte of scale for each 64 weights, and four bytes for each 256
of these (Dettmers et al., "QLoRA", 2023, section 3; block sizes of bitsandbytes)."""

INT8_ROW_BYTES = 4
"""The scale of a row of LLM.int8."""

SHOWN = 200
"""Characters of another library's message."""

SAMPLING_COPIES = 4
"""Of a row of logits in float32: scaled, sorted, cumulated, and the order."""


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes that one quantization takes. `kv_per_token` for each token that is kept."""

    quantization: str
    dtype: str
    weights: int
    kv_per_token: int
    activations: int


@dataclass(frozen=True, slots=True)
class Place:
    """A device with so many bytes free, of which the KV cache may take a share of what weights leave."""

    name: str
    free: int
    cache_share: float


@dataclass(frozen=True, slots=True)
class Fit:
    """Whether a quantization fits: `cache_tokens` is what `serve` would make of it, at least a window if it fits."""

    place: Place
    need: Need
    window: int

    @property
    def cache_tokens(self) -> int:
        left = self.place.free - self.need.weights - self.need.activations
        return max(0, min(DEFAULT_WINDOWS * self.window, int(left * self.place.cache_share) // self.need.kv_per_token))

    @property
    def fits(self) -> bool:
        """Whether one whole window has room."""
        return self.cache_tokens >= self.window


@dataclass(frozen=True, slots=True)
class Inspection:
    """What is known of a model before it is loaded; `window` in tokens."""

    model: str
    parameters: int
    window: int
    needs: tuple[Need, ...]
    places: tuple[Place, ...]

    def fits(self) -> list[Fit]:
        """Each place with each quantization."""
        return [Fit(place, need, self.window) for place in self.places for need in self.needs]


def inspect(settings: Settings) -> Inspection:
    """What this model needs, in every quantization, with these limits of a step. Raises LoadError."""
    try:
        config = configuration(model_source(settings.model), settings.model)
    except (OSError, ValueError, KeyError) as error:
        said = " ".join(str(error).split())[:SHOWN]
        raise LoadError(
            f"cannot read the configuration of {settings.model} ({said}): name `demo`, a directory, or a Hugging "
            "Face id"
        ) from error
    check_architecture(config, settings.model)
    if getattr(config, "quantization_config", None) is not None:
        raise LoadError(
            f"{settings.model} is quantized already: its weights take what its *.safetensors take on disk; "
            "name the checkpoint that it was made from"
        )
    try:
        return _measured(config, settings)
    except (AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise LoadError(
            f"{settings.model} has a configuration that cannot be measured ({type(error).__name__}), so it will hardly "
            f"be served here: {WAY_OUT}"
        ) from error


def _measured(config: Any, settings: Settings) -> Inspection:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    devices = [torch.device("cpu")] + ([torch.device("cuda")] if torch.cuda.is_available() else [])
    serving = devices[-1]
    needs = tuple(_need(model, config, quantization, serving, settings) for quantization in QUANTIZATIONS)
    places = tuple(
        Place(device.type, free_bytes(device), CUDA_CACHE_SHARE if device.type == "cuda" else CPU_CACHE_SHARE)
        for device in devices
    )
    return Inspection(settings.model, model.num_parameters(), window_of(config, settings.model), needs, places)


def weight_bytes(model: Any, quantization: str, itemsize: int) -> int:
    """Bytes of the weights; `model` may be on the meta device, `itemsize` is of what is not quantized."""
    output = model.get_output_embeddings()
    linear = {
        id(module.weight): module.weight
        for module in model.modules()
        if isinstance(module, nn.Linear) and module is not output
    }
    total = 0.0
    for parameter in model.parameters():  # a tied one comes once
        if quantization == "int8" and id(parameter) in linear:
            total += parameter.numel() + parameter.shape[0] * INT8_ROW_BYTES
        elif quantization == "int4" and id(parameter) in linear:
            total += parameter.numel() * INT4_BYTES
        else:
            total += parameter.numel() * itemsize
    return int(total)


def activation_bytes(config: Any, settings: Settings, itemsize: int, device_type: str) -> int:
    """About the most that a step holds beside weights and cache: a full batch in a layer's feed-forward part, or the
    keys and values of one layer copied out of the cache, whichever is more, and the logits with what sampling makes."""
    layer = _layer_bytes(config, settings.batch_tokens(device_type), itemsize)
    heads, size = kv_heads(config)
    # Of all that decode; where they read in place, of a prompt's last chunk alone, for every query head.
    copied = config.num_attention_heads if _in_place(settings, device_type) else settings.max_running * heads
    gathered = 2 * window_of(config, settings.model) * copied * size * itemsize
    logits = settings.max_running * config.vocab_size * (itemsize + 4 * SAMPLING_COPIES)
    return int(max(layer, gathered) + logits)


def recorded_bytes(config: Any, settings: Settings, itemsize: int) -> int:
    """What a GPU holds for recorded steps, in memory of their own: the logits of each, and the activations of the
    largest, which the others share."""
    if settings.eager:
        return 0
    sizes = bucket_sizes(settings.batch_tokens("cuda"))
    return int(sum(sizes) * config.vocab_size * itemsize) + _layer_bytes(config, sizes[-1], itemsize)


def _in_place(settings: Settings, device_type: str) -> bool:
    return device_type == "cuda" and not settings.eager


def _layer_bytes(config: Any, tokens: int, itemsize: int) -> int:
    """So many tokens in a layer's feed-forward part."""
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    return int(tokens * (4 * config.hidden_size + 3 * inner) * itemsize)


def _need(model: Any, config: Any, quantization: str, serving: torch.device, settings: Settings) -> Need:
    dtype = dtype_of(settings, quantization, config, serving)
    copied = copied_bytes(model, dtype) if serving.type == "cpu" else 0
    recorded = recorded_bytes(config, settings, dtype.itemsize) if serving.type == "cuda" else 0
    return Need(
        quantization,
        str(dtype).removeprefix("torch."),
        weight_bytes(model, quantization, dtype.itemsize) + copied,
        kv_bytes_per_token(config, dtype),
        activation_bytes(config, settings, dtype.itemsize, serving.type) + recorded,
    )


def table(found: Inspection) -> str:
    """For a terminal, in MiB and KiB."""
    rows = [("quantization", "rest in", "weights", "KV / token", "activations", *(p.name for p in found.places))]
    for need in found.needs:
        fits = [fit for fit in found.fits() if fit.need is need]
        rows.append(
            (
                need.quantization,
                need.dtype,
                f"{need.weights / 2**20:,.1f} MiB",
                f"{need.kv_per_token / 2**10:,.1f} KiB",
                f"{need.activations / 2**20:,.1f} MiB",
                *(f"fits, {f.cache_tokens:,} tokens" if f.fits else "does not fit" for f in fits),
            )
        )
    free = ", ".join(f"{place.name} {place.free / 2**30:,.1f} GiB" for place in found.places)
    head = f"{found.model}: {found.parameters / 1e6:,.1f} M parameters, window {found.window:,} tokens; free: {free}"
    return head + "\n\n" + _aligned(rows)


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)
