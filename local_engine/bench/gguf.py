"""Owns the writing of a Llama's weights and tokenizer as GGUF, the format that llama.cpp reads; refuses other families.

Version 3 of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md: a head, named values, a table of tensors, their
bytes. llama.cpp rotates neighbouring numbers of a head where transformers rotates halves, so query and key rows are
put in its order, as its own converter does.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import load_file
from torch import Tensor

from local_engine.bench.shapes import SPECIAL, TEMPLATE, Shape, pieces

ALIGNMENT = 32
TYPES = {torch.float32: 0, torch.bfloat16: 30}
FILE_TYPES = {torch.float32: 0, torch.bfloat16: 32}
NORMAL, CONTROL = 1, 3
UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write(shape: Shape, source: Path, target: Path, dtype: torch.dtype) -> Path:
    """The checkpoint in `source` as a GGUF file with weights of this type; norms are float32. Once."""
    if target.exists():
        return target
    weights = _renamed(load_file(source / "model.safetensors"), shape)
    tensors = {name: value.to(dtype if value.dim() == 2 else torch.float32) for name, value in weights.items()}
    partial = target.with_suffix(".partial")
    with partial.open("wb") as file:
        _write(file, _values(shape, dtype), tensors)
    partial.rename(target)
    return target


def _renamed(weights: Mapping[str, Tensor], shape: Shape) -> dict[str, Tensor]:
    found = {
        "token_embd.weight": weights["model.embed_tokens.weight"],
        "output_norm.weight": weights["model.norm.weight"],
        "output.weight": weights["lm_head.weight"],
    }
    for layer in range(shape.layers):
        for name, short in NAMES.items():
            value = weights[f"model.layers.{layer}.{name}.weight"]
            if short in ("attn_q", "attn_k"):
                value = interleaved(value, shape.heads if short == "attn_q" else shape.kv_heads)
            found[f"blk.{layer}.{short}.weight"] = value
    return found


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows of each head [half, half] → [one, other, one, other, …]."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _values(shape: Shape, dtype: torch.dtype) -> dict[str, bytes]:
    tokens, merges = pieces(shape.vocabulary)
    return {
        "general.architecture": _string("llama"),
        "general.name": _string(shape.name),
        "general.file_type": _uint(FILE_TYPES[dtype]),
        "llama.vocab_size": _uint(shape.vocabulary),
        "llama.context_length": _uint(shape.positions),
        "llama.embedding_length": _uint(shape.hidden),
        "llama.block_count": _uint(shape.layers),
        "llama.feed_forward_length": _uint(shape.inner),
        "llama.attention.head_count": _uint(shape.heads),
        "llama.attention.head_count_kv": _uint(shape.kv_heads),
        "llama.attention.layer_norm_rms_epsilon": struct.pack("<If", FLOAT32, 1e-6),
        "llama.rope.dimension_count": _uint(shape.hidden // shape.heads),
        "llama.rope.freq_base": struct.pack("<If", FLOAT32, 10_000.0),
        "tokenizer.ggml.model": _string("gpt2"),
        "tokenizer.ggml.pre": _string("gpt-2"),
        "tokenizer.ggml.tokens": _strings(tokens),
        "tokenizer.ggml.token_type": _ints([CONTROL if token in SPECIAL else NORMAL for token in tokens]),
        "tokenizer.ggml.merges": _strings([f"{one} {other}" for one, other in merges]),
        "tokenizer.ggml.eos_token_id": _uint(0),
        "tokenizer.ggml.add_bos_token": struct.pack("<I?", BOOL, False),
        "tokenizer.chat_template": _string(TEMPLATE),
    }


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _string(text: str) -> bytes:
    return struct.pack("<I", STRING) + _text(text)


def _uint(number: int) -> bytes:
    return struct.pack("<II", UINT32, number)


def _strings(texts: Sequence[str]) -> bytes:
    return struct.pack("<IIQ", ARRAY, STRING, len(texts)) + b"".join(map(_text, texts))


def _ints(numbers: Sequence[int]) -> bytes:
    return struct.pack(f"<IIQ{len(numbers)}i", ARRAY, INT32, len(numbers), *numbers)


def _write(file: BinaryIO, values: Mapping[str, bytes], tensors: Mapping[str, Tensor]) -> None:
    file.write(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(values)))
    for key, value in values.items():
        file.write(_text(key) + value)
    offset = 0
    for name, tensor in tensors.items():
        sizes = tuple(reversed(tensor.shape))
        file.write(_text(name) + struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes))
        file.write(struct.pack("<IQ", TYPES[tensor.dtype], offset))
        offset += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    for tensor in tensors.values():
        file.write(b"\0" * (-file.tell() % ALIGNMENT))
        file.write(_bytes(tensor))
    file.write(b"\0" * (-file.tell() % ALIGNMENT))


def _bytes(tensor: Tensor) -> Any:
    return tensor.contiguous().view(torch.uint8).numpy().data
