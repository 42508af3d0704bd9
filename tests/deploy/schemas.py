"""What a Kubernetes object must look like: the schemas of three releases, unknown fields refused, and those of two
custom resources, as far as we use them."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import jsonschema
import kubernetes_validate

KUBERNETES = ("1.35", "1.36", "1.37")
"""The releases that are maintained as this is written."""


def _closed(required: list[str] | None = None, **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": required or [],
        "additionalProperties": False,
    }


_TEXT = {"type": "string"}
_WORDS = {"type": "object", "additionalProperties": _TEXT}
_DURATION = {
    "type": "string",
    "pattern": r"^(0|(([0-9]+)y)?(([0-9]+)w)?(([0-9]+)d)?(([0-9]+)h)?(([0-9]+)m)?(([0-9]+)s)?)$",
}
_META = _closed(["name"], name=_TEXT, namespace=_TEXT, labels=_WORDS, annotations=_WORDS)
_SECRET_KEY = _closed(["key"], name=_TEXT, key=_TEXT, optional={"type": "boolean"})
_ENDPOINT = _closed(
    ["port"],
    port=_TEXT,
    path=_TEXT,
    scheme={"enum": ["http", "https", "HTTP", "HTTPS"]},
    interval=_DURATION,
    scrapeTimeout=_DURATION,
    authorization=_closed(type=_TEXT, credentials=_SECRET_KEY),
)
_RULE = _closed(
    ["expr"],
    alert=_TEXT,
    record=_TEXT,
    expr={"type": ["string", "integer"]},
    labels=_WORDS,
    annotations=_WORDS,
    keep_firing_for=_DURATION,
    **{"for": _DURATION},
)
_GROUP = _closed(["name"], name=_TEXT, interval=_DURATION, rules={"type": "array", "items": _RULE})


def _custom(kind: str, spec: dict[str, Any]) -> dict[str, Any]:
    version = {"const": "monitoring.coreos.com/v1"}
    return _closed(
        ["apiVersion", "kind", "metadata", "spec"], apiVersion=version, kind={"const": kind}, metadata=_META, spec=spec
    )


_SELECTOR = _closed(matchLabels=_WORDS)
_NAMESPACES = _closed(any={"type": "boolean"}, matchNames={"type": "array", "items": _TEXT})
_ENDPOINTS = {"type": "array", "items": _ENDPOINT, "minItems": 1}
CUSTOM = {
    "ServiceMonitor": _custom(
        "ServiceMonitor",
        _closed(
            ["selector", "endpoints"],
            selector=_SELECTOR,
            endpoints=_ENDPOINTS,
            namespaceSelector=_NAMESPACES,
            jobLabel=_TEXT,
        ),
    ),
    "PrometheusRule": _custom("PrometheusRule", _closed(["groups"], groups={"type": "array", "items": _GROUP})),
}
"""After the custom resource definitions of the Prometheus operator, v1."""


def problems_of(document: dict[str, Any]) -> list[str]:
    """What is wrong with an object in one of the releases; nothing where it is valid in all."""
    return _problems_of(json.dumps(document, sort_keys=True))


@cache  # 50 ms a time, and most objects are the same in every overlay and test
def _problems_of(text: str) -> list[str]:
    document = json.loads(text)
    if document["kind"] in CUSTOM:
        found = jsonschema.Draft202012Validator(CUSTOM[document["kind"]]).iter_errors(document)
        return [f"{error.json_path}: {error.message}" for error in found]
    problems = []
    for version in KUBERNETES:
        try:
            kubernetes_validate.validate(document, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            problems.append(f"{version}: {error.json_path}: {error.message}")
        except kubernetes_validate.SchemaNotFoundError as error:
            problems.append(f"{version}: {error.message}")
    return problems
