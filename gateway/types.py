"""The vocabulary: frozen dataclasses that every module shares. Read this first.

Owns the nouns and the arithmetic that belongs to one noun alone. Refuses everything that needs a policy, a clock or a
socket; what is known of the fleet at a moment is in `snapshot.py`, what is decided in `decision.py`.

Units: money is an integer of nano-dollars (`nusd`, 10^-9 USD), so that sums are exact; prices are nano-dollars per
token (1 USD per million tokens is 1,000 nusd a token); durations are seconds unless the name says `_ms`; windows and
counts are tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import ceil
from typing import Any, Literal

from gateway.limits import CallerLimits

ON_PREMISES = "on_premises"
UNSCANNABLE = "unscannable"
NUSD_PER_USD = 1_000_000_000

BackendKind = Literal["local", "openai", "litellm"]
LoadKind = Literal["hybridgate", "vllm"]
Capability = Literal["tools", "images", "schema"]


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks. `labels` are those of every request with the key; `deployments` and `slo` (the classes that may be
    asked for) are None where the key may use all. `limits` is None where nothing is limited."""

    tenant: str = "default"
    key_id: str = "anonymous"
    tags: frozenset[str] = frozenset()
    labels: frozenset[str] = frozenset()
    deployments: frozenset[str] | None = None
    slo: frozenset[str] | None = None
    limits: CallerLimits | None = None

    def may_use(self, deployment: str) -> bool:
        """Whether the key may use the deployment at all, whatever the policy says."""
        return self.deployments is None or deployment in self.deployments


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A parsed chat completion request together with its raw form.

    `body` is the JSON object as the client sent it and is never changed: backends build their own from it. `texts` are
    all strings of the body, decoded, keys and large numbers included: what labels and token counts look at. `parts` are
    the kinds of content that cannot be read as text (`image_url`, `input_audio`, `file`, ...), with `held` for an id
    whose content only a provider has.
    """

    body: Mapping[str, Any]
    model: str
    stream: bool
    include_usage: bool
    max_tokens: int | None
    n: int
    tools: bool
    images: bool
    schema: bool
    texts: tuple[str, ...] = field(repr=False)
    parts: frozenset[str]


@dataclass(frozen=True, slots=True)
class TokenCount:
    """Prompt tokens. `bound` holds for every tokenizer (see tokens.py), `exact` by tokenizer name only where a gate
    needed it. `open`: the prompt holds what nobody here can count (a picture, a file, an id that a provider holds), for
    which both have no more than an allowance."""

    bound: int
    estimate: int
    exact: Mapping[str, int] = field(default_factory=dict)
    open: bool = False

    def at_most(self, tokenizer: str) -> int:
        """What the prompt cannot exceed: the exact count where it is known, the bound otherwise."""
        return self.exact.get(tokenizer, self.bound)

    def about(self, tokenizer: str) -> int:
        """What the prompt probably has: the exact count where it is known, the estimate otherwise."""
        return self.exact.get(tokenizer, self.estimate)


@dataclass(frozen=True, slots=True)
class RequestFacts:
    """The few facts that a rule may look at. Holds no content of the request."""

    model: str
    tenant: str = "default"
    key_tags: frozenset[str] = frozenset()
    tags: frozenset[str] = frozenset()
    labels: frozenset[str] = frozenset()
    masked_labels: frozenset[str] | None = None  # those that stay once what was found is masked; None: it cannot be
    prompt: TokenCount = field(default_factory=lambda: TokenCount(0, 0))
    max_tokens: int | None = None
    stream: bool = False
    tools: bool = False
    images: bool = False
    schema: bool = False
    n: int = 1
    slo: str | None = None
    max_cost_nusd: int | None = None
    deployments: frozenset[str] | None = None
    key_id: str = "anonymous"
    headers: frozenset[tuple[str, str]] = frozenset()  # of the pairs (name, value) that the policy asks about
    likely_output: int | None = None  # tokens, learned from this caller's answers of late; None until there are some


@dataclass(frozen=True, slots=True)
class Price:
    """What tokens cost, nano-dollars each. `cached_input` is for the part of a prompt that the deployment had cached;
    None where that costs as much as the rest. `beyond` is (n, price): where a prompt has more than n tokens, all tokens
    of the request cost that price."""

    input: float
    output: float
    cached_input: float | None = None
    beyond: tuple[int, Price] | None = None

    def cost(self, usage: Usage) -> int:
        """Nano-dollars, rounded up so that a sum never falls short."""
        if self.beyond is not None and usage.prompt_tokens > self.beyond[0]:
            return self.beyond[1].cost(usage)
        total = usage.prompt_tokens * self.input + usage.completion_tokens * self.output
        if usage.cached_tokens and self.cached_input is not None:
            total -= usage.cached_tokens * (self.input - self.cached_input)
        return ceil(total)

    def of(self, prompt_tokens: int, output_tokens: int) -> int:
        """Nano-dollars where nothing was cached."""
        if self.beyond is not None and prompt_tokens > self.beyond[0]:
            return self.beyond[1].of(prompt_tokens, output_tokens)
        return ceil(prompt_tokens * self.input + output_tokens * self.output)


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one answer, as the deployment counted them. `cached_tokens` are those of the prompt that it had
    cached."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds. `connect`: to open the connection; `first_token`: from sending to the first token (a plain answer's
    first byte has `total`); `idle`: between two chunks of a stream; `total`: the whole answer."""

    connect: float = 2.0
    first_token: float = 60.0
    idle: float = 60.0
    total: float = 600.0

    def replaced(self, by: Mapping[str, float]) -> Timeouts:
        """The same but for those that are named."""
        return replace(self, **by) if by else self


@dataclass(frozen=True, slots=True)
class Speed:
    """How fast a deployment is by the catalog, before anything was measured: prompt tokens a second of an idle engine,
    milliseconds an output token of one sequence alone."""

    prefill_tokens_per_s: float
    ms_per_output_token: float


@dataclass(frozen=True, slots=True)
class Deployment:
    """Something that can answer.

    `unavailable` is a reason known at load (a missing key, an unset address): such a deployment is shown, never
    called, and costs nothing. `price` and `window` are None where nobody knows them. `price` is what one more request
    costs (routing), `full_price` what a token costs with everything shared out (bills); None where both are the same.
    `cost_basis` says in a sentence what both consist of. `speed` is a prior from the catalog. `tokenizer` names what
    counts its tokens: `deployment:NAME` for the served model's own, `tiktoken:ENCODING`, or `bytes` where only the
    bound is known. `load` is the way in which an engine of another backend than `local` says how busy it is; None where
    it has none. `ca_file` is a PEM file of the authorities to trust for an https address. `networks` in CIDR notation
    are where its addresses must lie; anywhere where there are none. `quantization` is how an engine of ours stores its
    weights, `speculation` how it guesses tokens ahead, with `draft_model` where that is a model's work.
    `served_locally` is true for an engine that the gateway starts itself.
    """

    name: str
    backend: BackendKind
    model: str
    zone: str
    urls: tuple[str, ...] = ()
    api_key: str | None = field(default=None, repr=False)
    api_base: str | None = None
    price: Price | None = None
    full_price: Price | None = None
    cost_basis: str = ""
    speed: Speed | None = None
    window: int | None = None
    default_max_tokens: int = 1024
    capabilities: frozenset[Capability] = frozenset()
    tokenizer: str = "bytes"
    load: LoadKind | None = None
    timeouts: Timeouts = Timeouts()
    ca_file: str | None = None
    networks: tuple[str, ...] = ()
    quantization: str = "none"
    speculation: str = "off"
    draft_model: str | None = None
    unavailable: str | None = None

    @property
    def is_ours(self) -> bool:
        """Whether it is an engine of this project, wherever that runs."""
        return self.backend == "local" or self.load == "hybridgate"

    @property
    def served_locally(self) -> bool:
        return self.backend == "local" and not self.urls

    @property
    def bill(self) -> Price | None:
        """What its tokens cost on a bill; None where nobody knows."""
        return self.full_price or self.price

    def output_tokens(self, max_tokens: int | None) -> int:
        """Tokens to keep free for the answer: what the caller asks for, else the default but at most a quarter of the
        window."""
        if max_tokens is not None:
            return max_tokens
        return self.default_max_tokens if self.window is None else min(self.default_max_tokens, self.window // 4)

    def most_prompt_tokens(self, prompt: TokenCount) -> int | None:
        """What the prompt cannot exceed here, whatever it holds: its window, where it cannot be counted; None where
        that is not known."""
        return self.window if prompt.open else prompt.at_most(self.tokenizer)

    def fits(self, prompt: TokenCount, max_tokens: int | None) -> bool:
        """Whether prompt and answer fit the window. An unknown window holds everything: the provider will say."""
        window = self.window
        if window is None:
            return True
        output = self.output_tokens(None) if max_tokens is None else max_tokens
        return prompt.exact.get(self.tokenizer, prompt.bound) + output <= window


@dataclass(frozen=True, slots=True)
class Replica:
    """One of several places where a deployment answers: an address of the file, and the IP address to connect to; None
    where the name is looked up whenever a connection is opened."""

    url: str
    address: str | None = None


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try on one deployment; `number` counts from 1."""

    deployment: str
    number: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an attempt ended, when it did not answer. `tokens` and `nusd` are what limits were charged for it."""

    attempt: Attempt
    reason: str
    timed_out: bool = False
    tokens: int = 0
    nusd: int = 0


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to wait in an engine's queue while another candidate could still answer in time: after `after_s` seconds
    the queue is left, unless the first token is about to come; `left_s` are then left until it is wanted. With less
    than `least_s` left nothing is gained by leaving any more."""

    after_s: float
    left_s: float
    least_s: float


Passage = Literal["as_is", "masked"]


@dataclass(frozen=True, slots=True)
class Permit:
    """What a request's labels allow, made from the invariants alone. The door checks it again, whatever was decided
    before.

    `zones` are where the request may go as it is, `masked_zones` where it may go besides once it is masked; None is
    every zone.
    """

    labels: frozenset[str]
    zones: frozenset[str] | None
    because: str = ""
    masked_zones: frozenset[str] | None = frozenset()

    def passage(self, zone: str) -> Passage | None:
        """How the request may go to the zone: as it is, masked, or not at all. Masked never where it may go as it
        is."""
        if self.allows(zone):
            return "as_is"
        return "masked" if self.masked_zones is None or zone in self.masked_zones else None

    def allows(self, zone: str) -> bool:
        """Whether the request may go to the zone as it is."""
        return self.zones is None or zone in self.zones


def usd(nusd: int) -> str:
    """Dollars as plain decimal text, exact: `usd(1500) == "0.0000015"`."""
    whole, rest = divmod(nusd, NUSD_PER_USD)
    return f"{whole}.{rest:09d}".rstrip("0").rstrip(".")
