"""The deployments file: what exists.

Owns the step from a deployment's text to a `Deployment`: its secrets and addresses from the environment, its price
and window from the file or litellm's map. Refuses to echo what it reads from the environment.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

from gateway.catalog.prices import ModelInfo, local_model_info, model_info
from gateway.limits import DeploymentLimits
from gateway.networks import PRIVATE, Networks, literal
from gateway.policy import AUTO, DEFAULT_RULE
from gateway.policyfile.costing import Costing, Served, costing
from gateway.policyfile.entries import Checked, Report, check
from gateway.policyfile.limiting import deployment_limits
from gateway.policyfile.nearness import suggestion
from gateway.policyfile.shapes import DeploymentShape, DeploymentsShape, TimeoutsShape
from gateway.policyfile.tree import Node
from gateway.types import ON_PREMISES, Capability, Deployment, Timeouts

BUNDLED = "demo"
LOCAL_MODEL_VARIABLE = "HYBRIDGATE_LOCAL_MODEL"
LOCAL = "local"
RESERVED = (AUTO, DEFAULT_RULE)
ALL_CAPABILITIES: frozenset[Capability] = frozenset({"tools", "images", "schema"})

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_KEY = re.compile(r"[!-~]+")


@dataclass(frozen=True, slots=True)
class Declared:
    """The deployments file as far as it is right. A deployment that is wrong is None, so that its name is known all
    the same."""

    deployments: Mapping[str, Deployment | None]
    models: Mapping[str, str]
    limits: Mapping[str, DeploymentLimits]
    file: Checked[DeploymentsShape]


@dataclass(frozen=True, slots=True)
class _Environment:
    """Where values of the file come from besides the file."""

    variables: Mapping[str, str]
    price_map: Mapping[str, Any]
    local_model_of: str | None


def declared(root: Node, env: Mapping[str, str], price_map: Mapping[str, Any], report: Report) -> Declared:
    """Compiles the deployments file. Rules are not known yet, so `models` is checked later, by `check_models`."""
    file = check(DeploymentsShape, root, "", report)
    for problem in file.missing():
        report(problem)
    entries = root.children("deployments")
    if "deployments" in root.keys and not entries and file.intact:
        report(file.problem('"deployments" names none; at least one is needed', "deployments"))
    environment = _Environment(env, price_map, _local_model_of(file, entries, env, report))
    compiled: dict[str, Deployment | None] = {}
    limits: dict[str, DeploymentLimits] = {}
    for name, node in entries.items():
        at = root.place_of(("deployments", name), key=True)
        entry = check(DeploymentShape, node, f'deployment "{name}"', report, at)
        if name in RESERVED:
            report(entry.problem(f'the name "{name}" is reserved'))
        deployment = compiled[name] = _Reading(name, entry, environment, report).deployment()
        held_to = deployment_limits(node.child("limits"), entry.subject, report)
        if held_to is not None:
            limits[name] = held_to
            if deployment is not None and deployment.unavailable is None:
                _check_priced(entry, deployment, held_to, report)
    return Declared(compiled, file.shape.models or {}, limits, file)


def _check_priced(
    entry: Checked[DeploymentShape], deployment: Deployment, limits: DeploymentLimits, report: Report
) -> None:
    """Money can only be counted where tokens have a price."""
    if deployment.bill is not None:
        return
    for stated in (limits.all, limits.each_key):
        if stated is not None and any(a.counted in ("usd_per_day", "usd_per_month") for a in stated.allowances):
            report(entry.problem('"limits" are on money, and the tokens have no price: state "cost"', "limits"))
            return


def _local_model_of(
    file: Checked[DeploymentsShape], entries: Mapping[str, Node], env: Mapping[str, str], report: Report
) -> str | None:
    """The deployment whose model the environment replaces; None where it says nothing."""
    if not env.get(LOCAL_MODEL_VARIABLE, "").strip():
        return None
    served = [
        name
        for name, node in entries.items()
        if "url" not in node.keys and (backend := node.child("backend")) is not None and backend.plain == "local"
    ]
    if LOCAL in served:
        return LOCAL
    if len(served) == 1:
        return served[0]
    found = "several local engines and none of them is" if served else "no deployment with `backend: local` and no url,"
    report(file.problem(f'{LOCAL_MODEL_VARIABLE} is set, but there is {found} called "{LOCAL}"', "deployments"))
    return None


def check_models(declared: Declared, rules: Collection[str], report: Report) -> None:
    """Reports names for clients that collide with another name, or that stand for nothing."""
    targets = {AUTO, *declared.deployments, *rules, DEFAULT_RULE}
    for name, target in declared.models.items():
        if name in targets:
            report(
                declared.file.problem(
                    f'models: "{name}" is already the name of something else', "models", name, key=True
                )
            )
        if target not in targets:
            report(
                declared.file.problem(
                    f'models: "{target}" is no deployment, no rule and not `auto`{suggestion(target, targets)}',
                    "models",
                    name,
                )
            )


class _Reading:
    """One deployment on its way from text to a `Deployment`. `sound` turns false with the first problem; each is
    reported once."""

    def __init__(self, name: str, entry: Checked[DeploymentShape], environment: _Environment, report: Report) -> None:
        self.name = name
        self.entry = entry
        self.shape = entry.shape
        self.environment = environment
        self.report = report
        self.sound = entry.intact
        self.unset: list[str] = []
        self.replaced = environment.local_model_of == name

    def deployment(self) -> Deployment | None:
        """The deployment, or None where anything about it is wrong. Called once."""
        shape = self.shape
        for problem in self.entry.missing():
            self.report(problem)
            self.sound = False
        self._check_backend()
        urls = tuple(self._url(index, url) for index, url in enumerate(shape.url or []))
        networks = self._networks()
        self._check_urls(urls, networks)
        api_key = self._api_key()
        model = self._model()
        info = self._info(model)
        costing = self._costing(model, info)
        if not self.sound or shape.backend is None or shape.zone is None:
            return None
        relayed = shape.backend != "litellm"
        deployment = Deployment(
            name=self.name,
            backend=shape.backend,
            model=model,
            zone=shape.zone,
            urls=urls if relayed else (),
            api_key=api_key,
            api_base=None if relayed or not urls else urls[0],
            price=costing.price,
            full_price=costing.full_price,
            cost_basis=costing.basis,
            speed=costing.speed,
            # What was written for another model says nothing about the one that replaces it.
            window=info.window if self.replaced or shape.context_window is None else shape.context_window,
            capabilities=(
                info.capabilities if self.replaced or shape.capabilities is None else frozenset(shape.capabilities)
            ),
            tokenizer=self._tokenizer(),
            load=shape.load,
            timeouts=_timeouts(shape.timeouts),
            ca_file=shape.ca_file,
            networks=networks,
            quantization=shape.quantization or "none",
            speculation=shape.speculation or "off",
            draft_model=shape.draft,
            unavailable=_not_set(list(dict.fromkeys(self.unset))),
        )
        return replace(deployment, default_max_tokens=shape.default_max_tokens or deployment.default_max_tokens)

    def _wrong(self, message: str, *loc: str | int, key: bool = False) -> None:
        self.report(self.entry.problem(message, *loc, key=key))
        self.sound = False

    def _check_backend(self) -> None:
        """Keys that this backend needs, and keys that it has no use for."""
        backend, stated, timeouts = self.shape.backend, self.entry.node.keys, self.shape.timeouts
        if timeouts is not None and self.entry.intact and not timeouts.model_fields_set:
            self._wrong('"timeouts" states none', "timeouts")
        if backend == "openai" and "url" not in stated:
            self._wrong('"url" is missing: `backend: openai` needs the address of the server, up to and with its /v1')
        if backend == "litellm" and len(self.shape.url or []) > 1:
            self._wrong('"url" has several addresses; `backend: litellm` takes one', "url")
        if backend in ("local", "litellm") and "load" in stated:
            why = "our engine always says" if backend == "local" else "a cloud provider does not say"
            self._wrong(f'"load" has no use here: {why} how busy it is', "load", key=True)
        if backend == "litellm" and "ca_file" in stated:
            self._wrong('"ca_file" has no use here: set SSL_CERT_FILE for cloud providers', "ca_file", key=True)
        if backend == "local" and "url" not in stated and "api_key" in stated:
            self._wrong('"api_key" has no use for an engine that the gateway starts itself', "api_key", key=True)
        if backend == "local" and "tokenizer" in stated:
            self._wrong('"tokenizer" has no use here: a local engine counts with its own', "tokenizer", key=True)
        if backend == "local" and "images" in (self.shape.capabilities or ()):
            self._wrong(
                '"capabilities" of a local engine are tools and schema: it does not read images', "capabilities"
            )
        if "networks" in stated and (backend == "litellm" or "url" not in stated):
            self._wrong(
                '"networks" has no use here: it says where the addresses of `url` may lie', "networks", key=True
            )
        self._check_quantization()
        self._check_speculation()

    def _check_speculation(self) -> None:
        shape = self.shape
        for name, value in (("speculation", shape.speculation), ("draft", shape.draft)):
            if value is not None and (shape.backend not in (LOCAL, None) or shape.url):
                self._wrong(f'"{name}" is for an engine that the gateway starts itself', name, key=True)
        if shape.draft is not None and shape.speculation != "draft":
            self._wrong('"draft" needs `speculation: draft`', "draft", key=True)
        if shape.speculation == "draft" and shape.draft is None and shape.model not in (BUNDLED, None):
            self._wrong(
                '"speculation" is draft, which needs a "draft" with the same tokenizer; only `demo` brings one',
                "speculation",
            )

    def _check_quantization(self) -> None:
        quantization = self.shape.quantization
        if quantization is None:
            return
        if self.shape.backend not in (LOCAL, None):
            self._wrong('"quantization" is for `backend: local` alone', "quantization", key=True)

    def _expanded(self, text: str, *loc: str | int) -> str:
        """The text with each `${NAME}` replaced; as it stands where a variable is not set, which makes the deployment
        unavailable."""
        if "${" in _VARIABLE.sub("", text):
            self._wrong(f'"{loc[0]}" has a "${{" that begins no variable; write ${{NAME}}', *loc)
            return text
        unset = [name for name in _VARIABLE.findall(text) if not self.environment.variables.get(name, "").strip()]
        if unset:
            self.unset += unset
            return text
        return _VARIABLE.sub(lambda found: self.environment.variables[found[1]].strip(), text)

    def _url(self, index: int, text: str) -> str:
        loc = ("url", index)
        unset = len(self.unset)
        url = self._expanded(text, *loc)
        if len(self.unset) == unset and (wrong := _wrong_with_url(url)):
            names = " and ".join(_VARIABLE.findall(text))
            self._wrong(f'"url"{f" with {names} filled in" if names else ""} {wrong}', *loc)
        return url.rstrip("/")

    def _networks(self) -> tuple[str, ...]:
        """Where the addresses must lie: on premises in a private network, where the file names no others."""
        stated = self.shape.networks
        if stated is None:
            relayed = self.shape.backend != "litellm" and self.shape.url is not None
            return PRIVATE if relayed and self.shape.zone == ON_PREMISES else ()
        for index, network in enumerate(stated):
            try:
                Networks([network])
            except ValueError:
                self._wrong('"networks" has one that is no network such as 203.0.113.0/24', "networks", index)
        return tuple(stated)

    def _check_urls(self, urls: tuple[str, ...], networks: tuple[str, ...]) -> None:
        """Addresses that are stated twice, and those that no request could be sent to."""
        for index, url in enumerate(urls if self.sound and not self.unset else ()):
            if url in urls[:index]:
                self._wrong('"url" has the same address twice', "url", index)
            host = literal(urlsplit(url).hostname or "")
            if host is not None and not Networks(networks).hold(host):
                where = "of `networks`" if self.shape.networks else "of private networks; name its own in `networks`"
                self._wrong(f'"url" is outside {where}', "url", index)

    def _api_key(self) -> str | None:
        """The key's value. Neither the text of the file nor the value gets into a message: both may be a secret."""
        text = self.shape.api_key
        if text is None:
            return None
        found = _VARIABLE.fullmatch(text)
        if found is None:
            self._wrong('"api_key" is written out; put it in the environment and write ${NAME}', "api_key")
            return None
        value = self.environment.variables.get(found[1], "").strip()
        if not value:
            self.unset.append(found[1])
            return None
        if not _KEY.fullmatch(value):
            self._wrong(f'"api_key": the value of {found[1]} has characters that no header can carry', "api_key")
        return value

    def _model(self) -> str:
        if self.replaced:
            return self.environment.variables[LOCAL_MODEL_VARIABLE].strip()
        return self._expanded(self.shape.model or "", "model")

    def _info(self, model: str) -> ModelInfo:
        """What is known of the model without the file saying so."""
        if self.shape.backend == "litellm":
            return model_info(model, self.environment.price_map)
        if self.shape.backend == "openai":
            return ModelInfo(capabilities=ALL_CAPABILITIES)
        return local_model_info(model)

    def _costing(self, model: str, info: ModelInfo) -> Costing:
        """What the file states, else what is known; a litellm model without either is a problem, since its price is
        real."""
        if "cost" not in self.entry.node.keys:
            known = info.price is not None or "model" not in self.entry.node.keys or bool(self.unset)
            if self.shape.backend == "litellm" and not known:
                hint = "state cost: {usd_per_million_tokens: {input: ..., output: ...}}"
                likely = suggestion(self.shape.model or "", self.environment.price_map)
                self._wrong(f"litellm's price map has no price for this model{likely}; {hint}", "model")
            return Costing(info.price, basis=info.source)
        if not self.sound:
            return Costing()
        node = self.entry.node.child("cost")
        served = Served(
            model=model,
            quantization=self.shape.quantization or "none",
            provider=self.shape.backend == "litellm",
            known=info.price,
            certain=not self.unset and not self.replaced,
            replaced=self.replaced,
        )
        return costing(self.shape.cost, node.keys if node is not None else (), served, self._wrong)

    def _tokenizer(self) -> str:
        if self.shape.backend == "local":
            return f"deployment:{self.name}"
        name = self.shape.tokenizer or "o200k_base"
        return name if name == "bytes" else f"tiktoken:{name}"


def _not_set(names: list[str]) -> str | None:
    return f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} not set" if names else None


def _timeouts(shape: TimeoutsShape | None) -> Timeouts:
    return Timeouts() if shape is None else replace(Timeouts(), **shape.model_dump(exclude_none=True))


def _wrong_with_url(url: str) -> str | None:
    """What is wrong with an address; the address is not repeated, since it may hold a password."""
    try:
        parts = urlsplit(url)
        port_is_right = parts.port != 0
    except ValueError:
        return "is not an address; write one such as http://host:8000/v1"
    if parts.scheme not in ("http", "https") or not parts.hostname or not port_is_right or not _KEY.fullmatch(url):
        return "must be an address such as http://host:8000/v1"
    if parts.username is not None or parts.password is not None:
        return "must not hold a user or password; use `api_key`"
    if parts.query or parts.fragment:
        return "must end with its path: nothing after ? or # is sent"
    return None
