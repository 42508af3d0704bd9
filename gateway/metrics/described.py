"""Every metric's name, type, labels and meaning, from which the documentation is made. Refuses to count."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["counter", "gauge", "histogram"]


@dataclass(frozen=True, slots=True)
class Described:
    """One metric, by the name that Prometheus stores."""

    name: str
    kind: Kind
    labels: tuple[str, ...]
    help: str

    @property
    def family(self) -> str:
        """The name without what the format appends by itself."""
        return self.name.removesuffix("_total")


REQUESTS = Described(
    "hybridgate_requests_total",
    "counter",
    ("deployment", "rule", "outcome"),
    "Requests that have ended. `deployment` is empty where none answered, or a stored answer did; `outcome` is `ok`, "
    "an error's code, `cut` or `client_gone`.",
)
LABELLED = Described(
    "hybridgate_labelled_requests_total", "counter", ("label",), "Decided requests that carry a label of the policy."
)
FAILOVERS = Described(
    "hybridgate_failovers_total",
    "counter",
    ("deployment",),
    "Attempts on this deployment that failed before the first token, after which the next candidate was tried.",
)
EGRESS_DENIED = Described(
    "hybridgate_egress_denied_total",
    "counter",
    (),
    "Calls that the one door refused although a decision allowed them: a defect; nothing was sent.",
)
TOKENS = Described(
    "hybridgate_tokens_total",
    "counter",
    ("deployment", "kind"),
    "Tokens of answered requests; `kind` is `prompt`, `cached` (the part of prompts that the deployment had cached) or "
    "`completion`.",
)
COST = Described(
    "hybridgate_cost_usd_total", "counter", ("deployment",), "What answered requests cost, US dollars, as billed."
)
MARGINAL_COST = Described(
    "hybridgate_marginal_cost_usd_total",
    "counter",
    ("deployment",),
    "The same at the margin, which rules compare: what one more request costs.",
)
PREDICTED_COST = Described(
    "hybridgate_predicted_cost_usd_total",
    "counter",
    ("deployment",),
    "What decisions had predicted for those requests, US dollars at the margin.",
)
FIRST_TOKEN = Described(
    "hybridgate_first_token_seconds",
    "histogram",
    ("deployment",),
    "From a request's arrival to its first token, of streams.",
)
DURATION = Described(
    "hybridgate_request_duration_seconds", "histogram", ("deployment",), "From a request's arrival to its end."
)
FORECASTS = Described(
    "hybridgate_first_token_forecasts_total",
    "counter",
    ("deployment", "result"),
    "Streams whose first token was predicted and came at the first attempt: `within` the predicted 95th percentile or "
    "`above` it. 95 of 100 are meant to be within.",
)
SLO = Described(
    "hybridgate_slo_requests_total",
    "counter",
    ("slo", "result"),
    "Streams with a latency class: `met` where the first token came within what the class and the rule ask for, else "
    "`missed`.",
)
PER_TOKEN = Described(
    "hybridgate_per_token_seconds",
    "histogram",
    ("deployment",),
    "Mean time between two tokens of a stream, after its first.",
)
DECIDED = Described(
    "hybridgate_decision_seconds",
    "histogram",
    (),
    "From a request's arrival to its first decision: what the gateway itself takes before a deployment is asked.",
)
TENANT_REQUESTS = Described(
    "hybridgate_tenant_requests_total",
    "counter",
    ("tenant",),
    "Requests that have ended, by whose they are. The tenants are those of the keys; beyond 200 they are `other`.",
)
TENANT_TOKENS = Described(
    "hybridgate_tenant_tokens_total", "counter", ("tenant",), "Prompt and completion tokens of answered requests."
)
TENANT_COST = Described(
    "hybridgate_tenant_cost_usd_total", "counter", ("tenant",), "What answered requests cost, US dollars, as billed."
)
USAGE_LOST = Described("hybridgate_usage_records_lost_total", "counter", (), "Usage records that could not be kept.")
USAGE_WAITING = Described(
    "hybridgate_usage_records_waiting", "gauge", (), "Usage records that Redis does not have yet."
)
UP = Described("hybridgate_deployment_up", "gauge", ("deployment", "zone"), "1 where the deployment can be called now.")
IN_FLIGHT = Described(
    "hybridgate_deployment_in_flight", "gauge", ("deployment",), "Attempts on the deployment under way."
)
CIRCUIT_OPEN = Described(
    "hybridgate_deployment_circuit_open",
    "gauge",
    ("deployment",),
    "1 while failures keep requests away from it.",
)
REPLICA_UP = Described(
    "hybridgate_replica_up",
    "gauge",
    ("deployment", "replica"),
    "1 where the replica can be called and answers. `replica` is the least number that no other of the deployment has; "
    "it is given again once the replica is gone. For deployments of several addresses.",
)
REPLICA_IN_FLIGHT = Described(
    "hybridgate_replica_in_flight", "gauge", ("deployment", "replica"), "Attempts on the replica under way."
)
REPLICA_ANSWERS = Described(
    "hybridgate_replica_answers_total", "counter", ("deployment", "replica"), "Requests that the replica answered."
)
REPLICA_MOVES = Described(
    "hybridgate_replica_moves_total",
    "counter",
    ("deployment", "replica"),
    "Attempts on this replica that failed before the first token, after which another replica got the request.",
)
POLICY_INFO = Described("hybridgate_policy_info", "gauge", ("path", "hash"), "1 for the policy in use.")
POLICY_LOADED = Described(
    "hybridgate_policy_loaded_timestamp_seconds", "gauge", (), "When the policy in use was loaded, seconds since 1970."
)
POLICY_LOADS = Described(
    "hybridgate_policy_loads_total",
    "counter",
    ("result",),
    "Times that the policy's files were loaded, the first at start; `result` is `success` or `failure`.",
)
POLICY_IN_STEP = Described(
    "hybridgate_policy_last_load_successful",
    "gauge",
    (),
    "1 where the policy in use is what its files say, 0 where they do not load.",
)
POLICY_ERRORS = Described("hybridgate_policy_errors", "gauge", (), "Errors in the policy's files as they stand now.")
CACHE_REQUESTS = Described(
    "hybridgate_cache_requests_total",
    "counter",
    ("result",),
    "Requests that a stored answer would do for: `hit` where there was one, or another request's call answered it as "
    "well, `miss` where they made a call.",
)
CACHE_STORES = Described(
    "hybridgate_cache_stores_total",
    "counter",
    ("result",),
    "Answers that were to be stored: `stored`, or `too_large`.",
)
CACHE_UNAVAILABLE = Described(
    "hybridgate_cache_unavailable_total",
    "counter",
    (),
    "Times that what replicas share could not be asked, which counts as a miss.",
)
CACHE_ENTRIES = Described("hybridgate_cache_entries", "gauge", (), "Answers stored in this process.")
CACHE_BYTES = Described("hybridgate_cache_bytes", "gauge", (), "What they take.")
KEYS = Described("hybridgate_keys", "gauge", ("standing",), "Callers' keys: `valid`, `expired` or `revoked` now.")
KEYS_LOADS = Described(
    "hybridgate_keys_loads_total",
    "counter",
    ("result",),
    "Times that the file of keys was loaded, the first at start; `result` is `success` or `failure`.",
)
KEYS_IN_STEP = Described(
    "hybridgate_keys_last_load_successful",
    "gauge",
    (),
    "1 where the keys in use are what their file says, 0 where it does not load.",
)
STORE_UP = Described("hybridgate_redis_up", "gauge", (), "1 while Redis answers, 0 while nobody waits for it.")
STORE_FAILURES = Described("hybridgate_redis_failures_total", "counter", (), "Exchanges with Redis that failed.")
STORE_REPLICAS = Described("hybridgate_redis_replicas", "gauge", (), "Gateways that share it, as it last said.")
STORE_DAMAGED = Described(
    "hybridgate_redis_damaged_counters",
    "gauge",
    (),
    "Counters of limits in Redis that hold what no gateway wrote. Their limits do what `on_redis_down` says.",
)

WORKER_UP = Described(
    "hybridgate_worker_up",
    "gauge",
    ("worker",),
    "1 where the worker answers its parent. With several workers every other metric has the label `worker`, too.",
)
WORKER_RESTARTS = Described(
    "hybridgate_worker_restarts_total", "counter", ("worker",), "Times that the worker was started again."
)

METRICS = (
    REQUESTS,
    LABELLED,
    FAILOVERS,
    EGRESS_DENIED,
    TOKENS,
    COST,
    MARGINAL_COST,
    PREDICTED_COST,
    FIRST_TOKEN,
    DURATION,
    PER_TOKEN,
    DECIDED,
    FORECASTS,
    SLO,
    TENANT_REQUESTS,
    TENANT_TOKENS,
    TENANT_COST,
    UP,
    IN_FLIGHT,
    CIRCUIT_OPEN,
    REPLICA_UP,
    REPLICA_IN_FLIGHT,
    REPLICA_ANSWERS,
    REPLICA_MOVES,
    POLICY_INFO,
    POLICY_LOADED,
    POLICY_LOADS,
    POLICY_IN_STEP,
    POLICY_ERRORS,
    CACHE_REQUESTS,
    CACHE_STORES,
    CACHE_UNAVAILABLE,
    CACHE_ENTRIES,
    CACHE_BYTES,
    KEYS,
    KEYS_LOADS,
    KEYS_IN_STEP,
    STORE_UP,
    STORE_FAILURES,
    STORE_REPLICAS,
    STORE_DAMAGED,
    USAGE_LOST,
    USAGE_WAITING,
)
OF_WORKERS = (WORKER_UP, WORKER_RESTARTS)


def table() -> str:
    """The metrics as a Markdown table."""
    rows = [
        f"| `{m.name}` | {m.kind} | {', '.join(f'`{label}`' for label in m.labels)} | {m.help} |"
        for m in (*METRICS, *OF_WORKERS)
    ]
    return "\n".join(["| metric | type | labels | meaning |", "|---|---|---|---|", *rows])
