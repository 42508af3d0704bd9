"""What a deployment would cost and how fast it would answer. Pure.

Cost is prompt tokens x input price + output tokens x output price, in nano-dollars. For ranking the price is
the marginal one and the prompt is the estimate; for a cap, which must hold, the price is the bill's, the prompt is the
bound, and the output is the most that the deployment may write. A request for
several answers pays its prompt once and each answer.
"""

from __future__ import annotations

from gateway.types import Deployment, DeploymentStatus, RequestFacts, Usage


def likely_cost(deployment: Deployment, facts: RequestFacts) -> int | None:
    """Nano-dollars that one more request like this will probably cost there; None where the price is not known."""
    if deployment.price is None:
        return None
    return deployment.price.cost(
        Usage(facts.prompt.about(deployment.tokenizer), facts.n * deployment.output_tokens(facts.max_tokens))
    )


def likely_bill(deployment: Deployment, facts: RequestFacts) -> int | None:
    """Nano-dollars that a bill will probably show for the request; None where the price is not known."""
    if deployment.bill is None:
        return None
    return deployment.bill.cost(
        Usage(facts.prompt.about(deployment.tokenizer), facts.n * deployment.output_tokens(facts.max_tokens))
    )


def most_cost(deployment: Deployment, facts: RequestFacts) -> int | None:
    """Nano-dollars that the request's bill cannot exceed there, given that its output is bounded; None where the price
    is not known."""
    if deployment.bill is None:
        return None
    return deployment.bill.cost(
        Usage(facts.prompt.at_most(deployment.tokenizer), facts.n * deployment.output_tokens(facts.max_tokens))
    )


def first_token_ms(status: DeploymentStatus) -> float | None:
    """The 95th percentile of the time to the first token, milliseconds, as measured of late; None until it has been."""
    return status.first_token_p95_ms
