"""How much memory a model takes and how fast a device runs it, before anyone has measured. Pure.

Owns three sums. Memory: parameters x bytes per parameter, a key and a value per token, layer and KV head, and
what a forward holds at once. Time: a forward costs the larger of its operations over the device's compute and its
bytes over the device's bandwidth (the roofline: Williams, Waterman and Patterson 2009), each at the share of the peak
that serving engines reach, plus what launching costs per layer. Refuses to call the result a measurement.

    plan = Roofline.of(architecture("llama-3.1-8b"), hardware("h100-80gb"), "bf16")
    plan.kv_capacity_tokens             how many tokens of context fit beside the weights
    plan.prefill_tokens_per_s(2048)     prompt tokens a second, engine idle
    plan.decode_step_s(32, 32 * 2048)   seconds that one step of 32 sequences takes which hold 65,536 tokens in cache
    plan.step_s(...)                    seconds of a step that decodes and prefills at once
    plan.speed()                        a prior for a deployment nobody has called yet

The formulas are those of Pope et al., "Efficiently Scaling Transformer Inference" (2022), sections 2 and 3, and of
https://www.databricks.com/blog/llm-inference-performance-engineering-best-practices (2023).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import floor, inf
from typing import Literal, get_args

from gateway.catalog.hardware import GB, Hardware, Kind, Precision
from gateway.catalog.models import Architecture
from gateway.types import Speed

Quantization = Literal["fp32", "bf16", "fp16", "fp8", "int8", "int4"]
QUANTIZATIONS: tuple[Quantization, ...] = get_args(Quantization)

NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes a parameter under NF4 with double quantization: four bits, an 8-bit scale for 64 of them, and a 32-bit scale
for 256 of those (Dettmers et al., "QLoRA", 2023, section 3): 0.5159."""

USABLE = 0.9
"""Share of the memory for weights, cache and activations; the rest is the driver's, and fragments. vLLM's default
`gpu_memory_utilization`."""

PREFILL_CHUNK = 2048
"""Prompt tokens of one forward, which bounds the activations. vLLM's default `max_num_batched_tokens` for serving."""

PRIOR_PROMPT = 1024
"""Tokens of the prompt that a prior (`speed`) is worked out for."""


@dataclass(frozen=True, slots=True)
class Efficiency:
    """Shares of the peak that an engine reaches: `compute` in prefill, `bandwidth` in decode; `layer_s` is what
    launching one layer's kernels costs in seconds, and `scaling` what each device of several is worth."""

    compute: float
    bandwidth: float
    layer_s: float
    scaling: float = 0.85
    source: str = ""


EFFICIENCY: Mapping[Kind, Efficiency] = {
    "gpu": Efficiency(
        0.60,
        0.70,
        20e-6,
        source="what others measured on A100 and H100 (TensorRT-LLM 0.6 and gpt-fast): 60% of peak compute in prefill, "
        "70% of peak bandwidth in decode, 20 microseconds a layer; this project's engine reaches 57% and, beside "
        "those 20 microseconds, 66 to 75% on an H200 (Llama 2 7B, local_engine/README.md)",
    ),
    "tpu": Efficiency(
        0.50,
        0.60,
        20e-6,
        source="assumed for a TPU: 50% of peak compute in prefill (Pope et al. 2022 reach 76% at large batches), "
        "60% of peak bandwidth in decode, 20 microseconds a layer",
    ),
    "cpu": Efficiency(
        0.30,
        0.50,
        500e-6,
        source="assumed for a CPU: 30% of peak compute in prefill, 50% of peak bandwidth in decode, 500 microseconds a "
        "layer",
    ),
}

_UNPACKING: Mapping[Quantization, float] = {"int8": 0.75, "int4": 0.6}
"""Share of the bandwidth's efficiency that is left where weights are unpacked as they are read: gpt-fast moves 1,397 GB
a second in 16 bits, 1,069 in 8 and 863 in 4 (Llama 2 7B on an A100, https://github.com/pytorch-labs/gpt-fast)."""

_FP8_COMPUTE = 0.7
"""Share of the compute's efficiency that is left of the doubled peak under fp8: TensorRT-LLM 0.6 takes in 2,048 tokens
of Llama 2 7B in 36 ms on an H100, 39% of that peak
(https://github.com/NVIDIA/TensorRT-LLM/blob/v0.6.1/docs/source/performance.md)."""


class DoesNotRun(ValueError):
    """A model, a device and a quantization that do not go together, with what would."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes over all devices. `free` is negative where weights and activations alone are too much."""

    total: float
    usable: float
    weights: float
    activations: float
    kv_per_token: float

    @property
    def free(self) -> float:
        """What is left for the KV cache."""
        return self.usable - self.weights - self.activations


def weight_bytes(model: Architecture, quantization: Quantization) -> float:
    """Bytes of the weights. Quantized are the layers' matrices alone; embeddings, norms and the output matrix stay in
    16 bits, as bitsandbytes leaves them."""
    rest = model.parameters - model.linear
    match quantization:
        case "fp32":
            return 4.0 * model.parameters
        case "bf16" | "fp16":
            return 2.0 * model.parameters
        case "fp8":
            return model.linear + 2.0 * rest
        case "int8":
            return model.linear + 4.0 * model.linear_rows + 2.0 * rest
        case "int4":
            return NF4_BYTES * model.linear + 2.0 * rest


def kv_bytes_per_token(model: Architecture, count: int = 1, bytes_per_value: float = 2) -> float:
    """Bytes of KV cache that a token takes: 2 x layers x KV heads x head dimension x bytes, over all devices; where
    there are more devices than KV heads, each keeps a copy. A sliding window is not subtracted."""
    copies = max(1.0, count / model.kv_heads)
    return model.kv_values_per_token() * bytes_per_value * copies


def activation_bytes(model: Architecture, tokens: int = PREFILL_CHUNK, sequences: int = 256) -> float:
    """Bytes that one forward of `tokens` holds at its widest: residual, its normed copy, and the larger of attention's
    and the MLP's intermediates, in 16 bits; and logits of `sequences` in 32 bits, twice, as sampling copies them."""
    attention = (2 * model.heads + 2 * model.kv_heads) * model.head_dim
    mlp = 3 * model.intermediate * max(1, model.experts_per_token)
    return tokens * (2 * model.hidden + max(attention, mlp)) * 2.0 + 2 * sequences * model.vocab * 4.0


@dataclass(frozen=True, slots=True)
class Roofline:
    """A model on `count` devices. Made by `of`, which refuses what cannot run; whether it fits is `memory.free`."""

    model: Architecture
    hardware: Hardware
    quantization: Quantization
    count: int
    efficiency: Efficiency
    memory: Memory
    flops_per_s: float
    bytes_per_s: float

    @classmethod
    def of(
        cls,
        model: Architecture,
        hardware: Hardware,
        quantization: Quantization,
        count: int = 1,
        efficiency: Efficiency | None = None,
    ) -> Roofline:
        """Raises DoesNotRun where the device has no units for the precision."""
        precision = _precision(quantization, hardware)
        reached = efficiency or EFFICIENCY[hardware.kind]
        devices = count * (reached.scaling if count > 1 else 1.0)
        bandwidth = reached.bandwidth * _UNPACKING.get(quantization, 1.0)
        compute = reached.compute * (_FP8_COMPUTE if quantization == "fp8" else 1.0)
        return cls(
            model=model,
            hardware=hardware,
            quantization=quantization,
            count=count,
            efficiency=reached,
            memory=Memory(
                total=count * hardware.memory,
                usable=count * hardware.memory * USABLE,
                weights=weight_bytes(model, quantization),
                activations=count * activation_bytes(model),
                kv_per_token=kv_bytes_per_token(model, count, 4 if quantization == "fp32" else 2),
            ),
            flops_per_s=devices * hardware.compute[precision] * compute,
            bytes_per_s=devices * hardware.bandwidth * bandwidth,
        )

    def measured(self, prefill_tokens_per_s: float, decode_tokens_per_s: float, batch: int = 1) -> Roofline:
        """With the efficiency that was measured on an idle engine: prompt tokens a second at PRIOR_PROMPT tokens, and
        answer tokens a second of `batch` sequences of that length. What launching costs is within both."""
        flat = replace(self, efficiency=replace(self.efficiency, layer_s=0.0))
        prefill = replace(flat, bytes_per_s=inf).prefill_s(PRIOR_PROMPT) * self.flops_per_s  # operations
        decode = replace(flat, flops_per_s=inf).decode_step_s(batch, batch * PRIOR_PROMPT) * self.bytes_per_s  # bytes
        flops_per_s = prefill * prefill_tokens_per_s / PRIOR_PROMPT
        bytes_per_s = decode * decode_tokens_per_s / batch
        compute = self.efficiency.compute * flops_per_s / self.flops_per_s
        bandwidth = self.efficiency.bandwidth * bytes_per_s / self.bytes_per_s
        source = f"measured: {compute:.0%} of peak compute in prefill, {bandwidth:.0%} of peak bandwidth in decode"
        reached = replace(flat.efficiency, compute=compute, bandwidth=bandwidth, source=source)
        return replace(self, efficiency=reached, flops_per_s=flops_per_s, bytes_per_s=bytes_per_s)

    @property
    def fits(self) -> bool:
        """Whether weights and activations leave room for the cache of at least one token."""
        return self.kv_capacity_tokens > 0

    @property
    def kv_capacity_tokens(self) -> int:
        """Tokens of context, of all sequences together, whose cache fits beside the weights."""
        return max(0, floor(self.memory.free / self.memory.kv_per_token))

    def step_s(self, decoding: int, context_tokens: float, prefill: int = 0, prefill_context: float = 0.0) -> float:
        """Seconds of one forward that makes a token for each of `decoding` sequences, which hold `context_tokens` in
        cache together, and beside them takes in `prefill` prompt tokens, each of which looks back at
        `prefill_context` tokens on average."""
        tokens = decoding + prefill
        if tokens == 0:
            return 0.0
        model = self.model
        heads = decoding + (1 if prefill else 0)  # a prompt needs the output matrix for its last token alone
        attention = 4 * model.layers * model.heads * model.head_dim * (context_tokens + prefill * prefill_context)
        flops = 2 * model.active_linear * tokens + 2 * model.head * heads + attention
        read = self._weights_read(tokens) + self.memory.kv_per_token * (context_tokens + tokens)
        overhead = model.layers * self.efficiency.layer_s
        return overhead + max(flops / self.flops_per_s, read / self.bytes_per_s)

    def _weights_read(self, tokens: int) -> float:
        """Bytes of weights that a forward reads: all but the input embeddings, of which it reads a row a token; of a
        mixture's experts those that some token chose, if each chose evenly."""
        model = self.model
        shared = 0.0 if model.tied else 2.0 * model.head
        width = 4.0 if self.quantization == "fp32" else 2.0
        read = self.memory.weights - shared * width / 2.0
        if not model.experts:
            return read
        touched = 1 - (1 - model.experts_per_token / model.experts) ** tokens
        per_parameter = (self.memory.weights - width * (model.parameters - model.linear)) / model.linear
        one_expert = model.layers * 3 * model.hidden * model.intermediate
        return read - (1 - touched) * model.experts * one_expert * per_parameter

    def decode_step_s(self, batch: int, context_tokens: float) -> float:
        """Seconds until each of `batch` sequences has its next token; they hold `context_tokens` in cache together."""
        return self.step_s(batch, context_tokens)

    def prefill_s(self, prompt: int, chunk: int = PREFILL_CHUNK) -> float:
        """Seconds to take in a prompt alone, in forwards of at most `chunk` tokens, of which the last gives the first
        token."""
        done, total = 0, 0.0
        while done < prompt:
            tokens = min(chunk, prompt - done)
            total += self.step_s(0, done, tokens, done + tokens / 2)
            done += tokens
        return total

    def prefill_tokens_per_s(self, prompt: int = PRIOR_PROMPT) -> float:
        """Prompt tokens a second of an idle engine that takes in prompts of this length."""
        return prompt / self.prefill_s(prompt)

    def decode_tokens_per_s(self, batch: int, context: float) -> float:
        """Output tokens a second of `batch` sequences with `context` tokens each in cache."""
        return batch / self.decode_step_s(batch, batch * context)

    def most_sequences(self, context: int) -> int:
        """How many sequences of `context` tokens each fit at once."""
        return self.kv_capacity_tokens // max(1, context)

    def speed(self) -> Speed:
        """What to expect of an idle engine before it was measured."""
        return Speed(self.prefill_tokens_per_s(), self.decode_step_s(1, PRIOR_PROMPT) * 1000)


def what_would_fit(made: Roofline, need_tokens: int = 1) -> str:
    """Advice for a model that does not fit, or not with `need_tokens` of cache: fewer bits, then more devices, then
    none. Empty where it fits as it is."""
    if made.kv_capacity_tokens >= need_tokens:
        return ""
    advice = []
    smaller: tuple[Quantization, ...] = ("int8", "int4")
    for quantization in smaller:
        tried = Roofline.of(made.model, made.hardware, quantization, made.count, made.efficiency)
        if tried.memory.weights < made.memory.weights and tried.kv_capacity_tokens >= need_tokens:
            advice.append(f"{quantization} fits ({tried.memory.weights / GB:.1f} GB of weights)")
            break
    for count in (2, 4, 8, 16, 32):
        if count > made.count:
            tried = Roofline.of(made.model, made.hardware, made.quantization, count, made.efficiency)
            if tried.kv_capacity_tokens >= need_tokens:
                advice.append(f"{count} x {made.hardware.name} hold {made.quantization}")
                break
    return "; ".join(advice) or "no quantization and no number of devices up to 32 is enough"


def _precision(quantization: Quantization, hardware: Hardware) -> Precision:
    """What the matrices are multiplied in: 8-bit floats in their own units; whatever else is quantized is unpacked to
    16 bits first (bitsandbytes multiplies int8 as int8 only where no outliers are kept apart)."""
    if quantization in ("fp32", "fp8", "bf16", "fp16"):
        wanted: Precision = quantization
        if wanted in hardware.compute:
            return wanted
        others = [name for name in ("bf16", "fp16", "fp32") if name in hardware.compute]
        raise DoesNotRun(f"{hardware.name} has no {wanted}: use {' or '.join(others)}")
    return "bf16" if "bf16" in hardware.compute else "fp16"
