"""What a deployment would cost and how fast it would answer. Pure.

Cost is prompt tokens x input price + output tokens x output price, in nano-dollars. For ranking the prompt is the
estimate; for a cap, which must hold, it is the bound, and the output is the most that the deployment may write. A
request for several answers pays its prompt once and each answer.
"""

from __future__ import annotations

from gateway.types import Deployment, DeploymentStatus, RequestFacts, Usage


def likely_cost(deployment: Deployment, facts: RequestFacts) -> int | None:
    """Nano-dollars that the request will probably cost there; None where the price is not known."""
    if deployment.price is None:
        return None
    return deployment.price.cost(
        Usage(facts.prompt.about(deployment.tokenizer), facts.n * deployment.output_tokens(facts.max_tokens))
    )


def most_cost(deployment: Deployment, facts: RequestFacts) -> int | None:
    """Nano-dollars that the request cannot exceed there, given that its output is bounded; None where the price is not
    known."""
    if deployment.price is None:
        return None
    return deployment.price.cost(
        Usage(facts.prompt.at_most(deployment.tokenizer), facts.n * deployment.output_tokens(facts.max_tokens))
    )


def first_token_ms(status: DeploymentStatus) -> float | None:
    """The 95th percentile of the time to the first token, milliseconds, as measured of late; None until it has been."""
    return status.first_token_p95_ms
