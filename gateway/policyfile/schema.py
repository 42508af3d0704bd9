"""A file format as JSON Schema (2020-12), for editors: which keys there are, what they mean, what values look like.

Made from the shapes that loading uses, and refuses to know more than they do: what a name refers to, and what rules
mean together, only `hybridgate policy check` can say.
"""

from __future__ import annotations

from typing import Any

from pydantic import create_model

from gateway.policyfile.language import DefaultShape, InvariantShape, LabelShape, PolicyShape, RuleShape, SloShape
from gateway.policyfile.limiting import DeploymentLimitsShape, LimitsShape
from gateway.policyfile.shapes import DeploymentShape, DeploymentsShape, Shape
from gateway.policyfile.values import Label, Word

DIALECT = "https://json-schema.org/draft/2020-12/schema"

# Loading reads entries one by one, so that each is told where it stands; a schema has them all in one.
_POLICY = create_model(
    "PolicyShape",
    __base__=PolicyShape,
    labels=(dict[Label, LabelShape] | None, None),
    invariants=(list[InvariantShape] | None, None),
    slo=(dict[Word, SloShape] | None, None),
    rules=(list[RuleShape] | None, None),
    default=(DefaultShape | None, None),
)


class _DeploymentLimitsShape(DeploymentLimitsShape):
    each_key: LimitsShape | None = None


class _DeploymentShape(DeploymentShape):
    limits: _DeploymentLimitsShape | None = None


_DEPLOYMENTS = create_model(
    "DeploymentsShape", __base__=DeploymentsShape, deployments=(dict[Word, _DeploymentShape] | None, None)
)


def policy_schema() -> dict[str, Any]:
    """Of a policy file."""
    return schema_of(_POLICY, "A Hybridgate policy")


def deployments_schema() -> dict[str, Any]:
    """Of a deployments file."""
    return schema_of(_DEPLOYMENTS, "Deployments of Hybridgate")


def schema_of(shape: type[Shape], title: str) -> dict[str, Any]:
    """Of a file that is one mapping of this shape."""
    made: dict[str, Any] = _tidied(shape.model_json_schema(by_alias=True))
    return {"$schema": DIALECT, "title": title, **made}


def _tidied(schema: Any) -> Any:
    """Without what only Python has: titles made from names, null for what is not stated."""
    if isinstance(schema, list):
        return [_tidied(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    tidied: dict[str, Any] = {}
    for key, value in schema.items():
        if key in ("properties", "patternProperties", "$defs"):
            tidied[key] = {name: _tidied(part) for name, part in value.items()}
            if key == "patternProperties":
                tidied["additionalProperties"] = False
        elif key == "anyOf":
            stated = [_tidied(part) for part in value if part != {"type": "null"}]
            tidied |= {"anyOf": stated} if len(stated) > 1 else stated[0]
        elif key != "title" and (key, value) != ("default", None):
            tidied[key] = _tidied(value)
    return tidied
