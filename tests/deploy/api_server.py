"""A Kubernetes API server as far as `kubectl apply` needs one: discovery, and objects that are read, created, patched,
applied by the server, and deleted.

Every object that it is given is checked against the schemas of three Kubernetes releases, unknown fields refused, and
what does not pass is answered as the real one would (422). Owns no controllers: a Deployment makes no pods, and nothing
is defaulted.
"""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

from tests.deploy.patches import json_merge, strategic_merge
from tests.deploy.schemas import KUBERNETES, problems_of

Object = dict[str, Any]
Key = tuple[str, str, str]  # plural, namespace ("" for what has none), name


@dataclass(frozen=True)
class Resource:
    """A kind that the server knows."""

    group: str
    version: str
    plural: str
    kind: str
    namespaced: bool = True

    @property
    def group_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version

    @property
    def custom(self) -> bool:
        """Defined by a CustomResourceDefinition, and so without strategic merge patches."""
        return self.group == "monitoring.coreos.com"


RESOURCES = (
    Resource("", "v1", "namespaces", "Namespace", namespaced=False),
    Resource("", "v1", "configmaps", "ConfigMap"),
    Resource("", "v1", "secrets", "Secret"),
    Resource("", "v1", "services", "Service"),
    Resource("", "v1", "serviceaccounts", "ServiceAccount"),
    Resource("", "v1", "persistentvolumeclaims", "PersistentVolumeClaim"),
    Resource("apps", "v1", "deployments", "Deployment"),
    Resource("apps", "v1", "statefulsets", "StatefulSet"),
    Resource("autoscaling", "v2", "horizontalpodautoscalers", "HorizontalPodAutoscaler"),
    Resource("networking.k8s.io", "v1", "networkpolicies", "NetworkPolicy"),
    Resource("networking.k8s.io", "v1", "ingresses", "Ingress"),
    Resource("policy", "v1", "poddisruptionbudgets", "PodDisruptionBudget"),
    Resource("monitoring.coreos.com", "v1", "servicemonitors", "ServiceMonitor"),
    Resource("monitoring.coreos.com", "v1", "prometheusrules", "PrometheusRule"),
)
VERBS = ["create", "delete", "get", "list", "patch", "update"]


class Refused(Exception):
    """An answer that is not 2xx."""

    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.status = {
            "kind": "Status",
            "apiVersion": "v1",
            "status": "Failure",
            "code": code,
            "reason": reason,
            "message": message,
        }
        self.code = code


@dataclass
class Cluster:
    """What the server holds, and what it was asked for: `calls` are method and path of everything but discovery."""

    objects: dict[Key, Object] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    version: int = 0

    def of_kind(self, kind: str) -> dict[str, Object]:
        """Name to object, over all namespaces."""
        return {o["metadata"]["name"]: o for o in self.objects.values() if o["kind"] == kind}

    def get(self, key: Key) -> Object:
        if key not in self.objects:
            raise Refused(404, "NotFound", f'{key[0]} "{key[2]}" not found')
        return self.objects[key]

    def put(self, resource: Resource, key: Key, given: Object) -> Object:
        """Check and keep an object, new or changed. What is the same stays the same, its resourceVersion included."""
        namespace = key[1]
        if resource.namespaced and ("namespaces", "", namespace) not in self.objects:
            raise Refused(404, "NotFound", f'namespaces "{namespace}" not found')
        before = self.objects.get(key)
        meta = {k: v for k, v in given["metadata"].items() if k not in _SERVERS}
        given = {**given, "apiVersion": resource.group_version, "kind": resource.kind, "metadata": meta}
        if problems := problems_of(given):
            raise Refused(422, "Invalid", f'{resource.kind} "{key[2]}" is invalid: {"; ".join(problems)}')
        if before is not None:
            kept = {k: v for k, v in before["metadata"].items() if k in _SERVERS}
            if {**given, "metadata": {**meta, **kept}} == before:
                return before
        self.version += 1
        generation = 1 if before is None else before["metadata"]["generation"] + 1
        uid = str(uuid.uuid4()) if before is None else before["metadata"]["uid"]
        servers = {"uid": uid, "resourceVersion": str(self.version), "generation": generation}
        servers["creationTimestamp"] = "2026-01-01T00:00:00Z"
        self.objects[key] = {**given, "metadata": {**meta, **servers}}
        return self.objects[key]


_SERVERS = ("uid", "resourceVersion", "generation", "creationTimestamp", "managedFields")


class _Requests(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    cluster: Cluster

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def do_PATCH(self) -> None:
        self._answer(self._patch)

    def do_DELETE(self) -> None:
        self._answer(self._delete)

    def _answer(self, act: Any) -> None:
        self._body = self.rfile.read(int(self.headers.get("content-length") or 0))
        self._query = parse_qs(urlsplit(self.path).query)
        try:
            code, document = act(urlsplit(self.path).path)
        except Refused as refused:
            code, document = refused.code, refused.status
        text = json.dumps(document).encode()
        self.send_response(code)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def _get(self, path: str) -> tuple[int, Object]:
        discovered = discovery(path)
        if discovered is not None:
            return 200, discovered
        resource, key = self._addressed(path)
        if key[2]:
            return 200, self.cluster.get(key)
        items = [o for k, o in self.cluster.objects.items() if k[0] == key[0] and key[1] in ("", k[1])]
        listed = {"kind": f"{resource.kind}List", "apiVersion": resource.group_version, "metadata": {}}
        return 200, {**listed, "items": items}

    def _post(self, path: str) -> tuple[int, Object]:
        resource, (plural, namespace, _) = self._addressed(path)
        given = json.loads(self._body)
        key = (plural, namespace, given["metadata"]["name"])
        if key in self.cluster.objects:
            raise Refused(409, "AlreadyExists", f'{plural} "{key[2]}" already exists')
        return 201, self.cluster.put(resource, key, given)

    def _patch(self, path: str) -> tuple[int, Object]:
        resource, key = self._addressed(path)
        kind = self.headers["content-type"]
        if kind == "application/apply-patch+yaml":
            if not self._query.get("fieldManager"):
                raise Refused(400, "BadRequest", "PatchOptions.meta.k8s.io is invalid: fieldManager is required")
            new = key not in self.cluster.objects
            return 201 if new else 200, self.cluster.put(resource, key, yaml.safe_load(self._body))
        before, patch = self.cluster.get(key), json.loads(self._body)
        if kind == "application/strategic-merge-patch+json" and not resource.custom:
            return 200, self.cluster.put(resource, key, strategic_merge(before, patch))
        if kind == "application/merge-patch+json":
            return 200, self.cluster.put(resource, key, json_merge(before, patch))
        raise Refused(415, "UnsupportedMediaType", f"{kind} is not taken for {resource.kind}")

    def _delete(self, path: str) -> tuple[int, Object]:
        _, key = self._addressed(path)
        self.cluster.get(key)
        del self.cluster.objects[key]
        return 200, {"kind": "Status", "apiVersion": "v1", "status": "Success"}

    def _addressed(self, path: str) -> tuple[Resource, Key]:
        """The kind and the object of /api/v1/namespaces/NS/PLURAL/NAME and its shorter and grouped forms."""
        self.cluster.calls.append(f"{self.command} {path}")
        parts = path.strip("/").split("/")
        version, rest = ("/".join(parts[1:2]), parts[2:]) if parts[0] == "api" else ("/".join(parts[1:3]), parts[3:])
        namespace = ""
        if len(rest) > 2 and rest[0] == "namespaces":
            namespace, rest = rest[1], rest[2:]
        for resource in RESOURCES:
            if rest and resource.plural == rest[0] and resource.group_version == version:
                return resource, (resource.plural, namespace, rest[1] if len(rest) > 1 else "")
        raise Refused(404, "NotFound", "the server could not find the requested resource")


def discovery(path: str) -> Object | None:
    """What the server says of itself; None for another path."""
    groups = sorted({(r.group, r.version) for r in RESOURCES if r.group})
    if path == "/version":
        major, minor = KUBERNETES[-1].split(".")
        return {"major": major, "minor": minor, "gitVersion": f"v{KUBERNETES[-1]}.0"}
    if path == "/api":
        return {"kind": "APIVersions", "versions": ["v1"]}
    if path == "/apis":
        named = [(g, {"groupVersion": f"{g}/{v}", "version": v}) for g, v in groups]
        listed = [{"name": g, "versions": [version], "preferredVersion": version} for g, version in named]
        return {"kind": "APIGroupList", "apiVersion": "v1", "groups": listed}
    if path == "/openapi/v3":
        paths = {"api/v1": {"serverRelativeURL": "/openapi/v3/api/v1"}}
        paths |= {f"apis/{g}/{v}": {"serverRelativeURL": f"/openapi/v3/apis/{g}/{v}"} for g, v in groups}
        return {"paths": paths}
    if path.startswith("/openapi/v3/"):
        return _takes_field_validation(path.removeprefix("/openapi/v3/"))
    of_version = {f"/apis/{r.group_version}" if r.group else "/api/v1": r.group_version for r in RESOURCES}
    if path in of_version:
        kinds = [r for r in RESOURCES if r.group_version == of_version[path]]
        found: list[Object] = [
            {"name": r.plural, "singularName": "", "namespaced": r.namespaced, "kind": r.kind, "verbs": VERBS}
            for r in kinds
        ]
        return {"kind": "APIResourceList", "groupVersion": of_version[path], "resources": found}
    return None


def _takes_field_validation(prefix: str) -> Object:
    """An OpenAPI document that says only that patches take `fieldValidation`: the server checks, not kubectl."""
    paths = {}
    for r in RESOURCES:
        if prefix == (f"apis/{r.group_version}" if r.group else "api/v1"):
            kind = {"group": r.group, "version": r.version, "kind": r.kind}
            parameter = {"name": "fieldValidation", "in": "query", "schema": {"type": "string"}}
            patch = {"x-kubernetes-group-version-kind": kind, "parameters": [parameter], "responses": {}}
            paths[f"/{prefix}/{r.plural}/{{name}}"] = {"patch": patch}
    return {"openapi": "3.0.0", "info": {"title": "stub", "version": "1"}, "paths": paths}


@contextmanager
def api_server() -> Iterator[tuple[str, Cluster]]:
    """Its URL and what it holds, until the block ends."""
    cluster = Cluster()
    handler = type("Requests", (_Requests,), {"cluster": cluster})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", cluster
        finally:
            server.shutdown()
            thread.join()
