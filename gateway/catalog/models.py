"""The shapes of open models: how many parameters there are, which of them a token passes, and how much cache it leaves.

Owns the reading of a Hugging Face config.json and the rows of well-known models, which are such configs cut down to
what matters here. Refuses families whose parameters it cannot count exactly: a wrong count would be a wrong memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

FAMILIES = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "phi3", "smollm3")
"""`model_type`s that `architecture_of` counts exactly: gated MLPs, RMSNorm, rotary positions, grouped KV heads."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """A decoder's shape. `linear` are the parameters of the layers' matrices (what quantization shrinks), `head` those
    of the output matrix, which shares the input embedding's where `tied`; `active_linear` are the `linear` ones that
    one token passes, fewer in a mixture of `experts`. `window` in tokens. `source` says where the numbers are from."""

    name: str
    parameters: int
    active_parameters: int
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    window: int
    intermediate: int
    linear: int
    active_linear: int
    tied: bool
    source: str
    experts: int = 0
    experts_per_token: int = 0
    sliding_window: int | None = None

    @property
    def head(self) -> int:
        return self.vocab * self.hidden

    @property
    def linear_rows(self) -> int:
        """Rows of the quantized matrices, each with a scale of its own under int8; the MLP's three weigh most."""
        per_layer = 2 * self.hidden + (self.heads + 2 * self.kv_heads) * self.head_dim
        return self.layers * (per_layer + max(1, self.experts) * (2 * self.intermediate))

    def kv_values_per_token(self) -> int:
        """Numbers that one token leaves in the cache: a key and a value for each layer and KV head."""
        return 2 * self.layers * self.kv_heads * self.head_dim


class UnknownArchitecture(ValueError):
    """A model that cannot be counted, with what to state instead."""


def architecture_of(config: Mapping[str, Any], name: str, source: str) -> Architecture:
    """The shape that a Hugging Face config.json describes; a multimodal one counts as its text model alone.

    Raises UnknownArchitecture for a family that is not counted exactly, and for a config that lacks a number.
    """
    config = config.get("text_config") or config
    family = config.get("model_type")
    if family not in FAMILIES:
        raise UnknownArchitecture(
            f'{name}: models of type "{family}" are not counted; known are {", ".join(FAMILIES)}. '
            "State --parameters, --layers, --hidden, --heads, --kv-heads and --head-dim instead"
        )
    try:
        return _counted(config, str(family), name, source)
    except KeyError as missing:
        raise UnknownArchitecture(f"{name}: the config lacks {missing.args[0]}") from None
    except (TypeError, ZeroDivisionError):
        raise UnknownArchitecture(f"{name}: the config has something else where a number belongs") from None


def _counted(config: Mapping[str, Any], family: str, name: str, source: str) -> Architecture:
    layers, hidden, heads = config["num_hidden_layers"], config["hidden_size"], config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or hidden // heads
    vocab = config["vocab_size"]
    tied = bool(config.get("tie_word_embeddings", family == "smollm3"))
    experts = (config.get("num_local_experts") or config.get("num_experts") or 0) if family in _MIXTURES else 0
    chosen = config["num_experts_per_tok"] if experts else 0
    intermediate = config["moe_intermediate_size"] if family == "qwen3_moe" else config["intermediate_size"]

    queries, keys = heads * head_dim, kv_heads * head_dim
    attention = hidden * (2 * queries + 2 * keys)
    mlp = 3 * hidden * intermediate  # gate, up, down
    router = hidden * experts
    linear = layers * (attention + max(1, experts) * mlp + router)
    active_linear = layers * (attention + max(1, chosen) * mlp + router)

    biased = family == "qwen2" or bool(config.get("attention_bias"))
    biases = queries + 2 * keys + (hidden if biased and family in ("llama", "qwen3", "qwen3_moe") else 0)
    norms = 2 * hidden + (2 * head_dim if family in ("qwen3", "qwen3_moe") else 0)
    small = layers * (norms + (biases if biased else 0)) + hidden
    embeddings = vocab * hidden * (1 if tied else 2)
    return Architecture(
        name=name,
        parameters=linear + small + embeddings,
        active_parameters=active_linear + small + embeddings,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=vocab,
        window=config["max_position_embeddings"],
        intermediate=intermediate,
        linear=linear,
        active_linear=active_linear,
        tied=tied,
        source=source,
        experts=experts,
        experts_per_token=chosen,
        sliding_window=config.get("sliding_window") if family in ("mistral", "mixtral") else None,
    )


def stated(
    name: str,
    parameters: int,
    layers: int,
    hidden: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    vocab: int,
    window: int,
) -> Architecture:
    """A dense model whose numbers somebody states: what is not in the embeddings or attention is the MLP's. Raises
    UnknownArchitecture where too few parameters are left for that."""
    linear = parameters - 2 * vocab * hidden
    attention = 2 * hidden * (heads + kv_heads) * head_dim
    if linear <= layers * attention:
        raise UnknownArchitecture(
            f"{name}: {parameters:,} parameters are too few for {layers} layers of this attention and a vocabulary of "
            f"{vocab:,}: check --parameters, --layers, --hidden and --vocab"
        )
    return Architecture(
        name=name,
        parameters=parameters,
        active_parameters=parameters,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=vocab,
        window=window,
        intermediate=max(1, (linear // layers - attention) // (3 * hidden)),
        linear=linear,
        active_linear=linear,
        tied=False,
        source="stated",
    )


_MIXTURES = frozenset({"mixtral", "qwen3_moe"})


def _config(family: str, shape: tuple[int, int, int, int, int, int, int, int], **more: Any) -> Mapping[str, Any]:
    """A row: layers, hidden, intermediate, heads, KV heads, head dimension, vocabulary, window."""
    layers, hidden, intermediate, heads, kv_heads, head_dim, vocab, window = shape
    return {
        "model_type": family,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocab,
        "max_position_embeddings": window,
    } | more


_TIED = {"tie_word_embeddings": True}
_ROWS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    # name: (repository whose config.json has these numbers, the numbers)
    "demo": ("local_engine/demo_model", _config("llama", (4, 192, 448, 6, 2, 32, 2560, 1024), **_TIED)),
    "llama-2-7b": ("meta-llama/Llama-2-7b-chat-hf", _config("llama", (32, 4096, 11008, 32, 32, 128, 32000, 4096))),
    "llama-2-13b": ("meta-llama/Llama-2-13b-chat-hf", _config("llama", (40, 5120, 13824, 40, 40, 128, 32000, 4096))),
    "llama-2-70b": ("meta-llama/Llama-2-70b-chat-hf", _config("llama", (80, 8192, 28672, 64, 8, 128, 32000, 4096))),
    "llama-3.1-8b": (
        "meta-llama/Llama-3.1-8B-Instruct",
        _config("llama", (32, 4096, 14336, 32, 8, 128, 128256, 131072)),
    ),
    "llama-3.1-70b": (
        "meta-llama/Llama-3.1-70B-Instruct",
        _config("llama", (80, 8192, 28672, 64, 8, 128, 128256, 131072)),
    ),
    "llama-3.2-1b": (
        "meta-llama/Llama-3.2-1B-Instruct",
        _config("llama", (16, 2048, 8192, 32, 8, 64, 128256, 131072), **_TIED),
    ),
    "llama-3.2-3b": (
        "meta-llama/Llama-3.2-3B-Instruct",
        _config("llama", (28, 3072, 8192, 24, 8, 128, 128256, 131072), **_TIED),
    ),
    "llama-3.3-70b": (
        "meta-llama/Llama-3.3-70B-Instruct",
        _config("llama", (80, 8192, 28672, 64, 8, 128, 128256, 131072)),
    ),
    "mistral-7b": (
        "mistralai/Mistral-7B-Instruct-v0.3",
        _config("mistral", (32, 4096, 14336, 32, 8, 128, 32768, 32768)),
    ),
    "mistral-7b-v0.1": (
        "mistralai/Mistral-7B-Instruct-v0.1",
        _config("mistral", (32, 4096, 14336, 32, 8, 128, 32000, 32768), sliding_window=4096),
    ),
    "mistral-small-24b": (
        "mistralai/Mistral-Small-3.2-24B-Instruct-2506",
        _config("mistral", (40, 5120, 32768, 32, 8, 128, 131072, 131072)),
    ),
    "mixtral-8x7b": (
        "mistralai/Mixtral-8x7B-Instruct-v0.1",
        _config("mixtral", (32, 4096, 14336, 32, 8, 128, 32000, 32768), num_local_experts=8, num_experts_per_tok=2),
    ),
    "qwen2.5-7b": ("Qwen/Qwen2.5-7B-Instruct", _config("qwen2", (28, 3584, 18944, 28, 4, 128, 152064, 32768))),
    "qwen3-0.6b": ("Qwen/Qwen3-0.6B", _config("qwen3", (28, 1024, 3072, 16, 8, 128, 151936, 40960), **_TIED)),
    "qwen3-1.7b": ("Qwen/Qwen3-1.7B", _config("qwen3", (28, 2048, 6144, 16, 8, 128, 151936, 40960), **_TIED)),
    "qwen3-4b": (
        "Qwen/Qwen3-4B-Instruct-2507",
        _config("qwen3", (36, 2560, 9728, 32, 8, 128, 151936, 262144), **_TIED),
    ),
    "qwen3-8b": ("Qwen/Qwen3-8B", _config("qwen3", (36, 4096, 12288, 32, 8, 128, 151936, 40960))),
    "qwen3-14b": ("Qwen/Qwen3-14B", _config("qwen3", (40, 5120, 17408, 40, 8, 128, 151936, 40960))),
    "qwen3-32b": ("Qwen/Qwen3-32B", _config("qwen3", (64, 5120, 25600, 64, 8, 128, 151936, 40960))),
    "qwen3-30b-a3b": (
        "Qwen/Qwen3-30B-A3B-Instruct-2507",
        _config(
            "qwen3_moe",
            (48, 2048, 6144, 32, 4, 128, 151936, 262144),
            num_experts=128,
            num_experts_per_tok=8,
            moe_intermediate_size=768,
        ),
    ),
    "phi-4": ("microsoft/phi-4", _config("phi3", (40, 5120, 17920, 40, 10, 128, 100352, 16384))),
    "smollm3-3b": (
        "HuggingFaceTB/SmolLM3-3B",
        _config("smollm3", (36, 2048, 11008, 16, 4, 128, 128256, 65536), **_TIED),
    ),
}
_READ = "2025-11"  # when the rows were checked against parameter counts that the repositories publish

MODELS: Mapping[str, Architecture] = {
    name: architecture_of(config, name, f"config.json of {repository}, {_READ}")
    for name, (repository, config) in _ROWS.items()
}
REPOSITORIES: Mapping[str, str] = {repository: name for name, (repository, _) in _ROWS.items()}
_BY_REPOSITORY: Mapping[str, str] = {repository.lower(): name for repository, name in REPOSITORIES.items()}


def architecture(name: str) -> Architecture:
    """The model of that catalog name or Hugging Face id. Raises UnknownArchitecture with the nearest names."""
    wanted = name.lower()
    found = MODELS.get(wanted) or MODELS.get(_BY_REPOSITORY.get(wanted, ""))
    if found is not None:
        return found
    bare = wanted.rpartition("/")[2].removesuffix("-instruct").removesuffix("-chat")
    near = get_close_matches(bare, MODELS, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(MODELS)}"
    raise UnknownArchitecture(f"the catalog has no model {name!r} ({hint})")
