"""Which engines and clouds there are in the simulated world: from a fleet file, or by what is known of the deployments.

Owns the fleet file's language and the defaults. A deployment without a model of it does not exist in the simulation and
is shown as unavailable; whether its key is set in the environment is no matter here. Refuses to read files: what reads
them is an argument.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

from pydantic import Field

from gateway.catalog.hardware import UnknownHardware, hardware
from gateway.catalog.models import UnknownArchitecture, architecture
from gateway.policy import Policy
from gateway.policyfile.entries import Checked, check
from gateway.policyfile.shapes import Shape
from gateway.policyfile.tree import Node, Problem, parse
from gateway.policyfile.values import Count, Seconds, Share, Text, Tokens, Version, Word
from gateway.roofline import QUANTIZATIONS, DoesNotRun, Quantization, Roofline
from gateway.simulate.cloud import CloudModel, Quantiles
from gateway.simulate.mix import Request
from gateway.simulate.step import EngineModel, of_calibration, of_roofline
from gateway.simulate.trace import TraceError
from gateway.types import ON_PREMISES, Deployment

BUNDLED = "demo@cpu-host/fp32"
"""The engine of a deployment whose model nobody described: the bundled one, on a CPU."""

Read = Callable[[str], str]


@dataclass(frozen=True, slots=True)
class FleetModel:
    """The simulated engines and clouds, by the name of their deployment."""

    engines: Mapping[str, EngineModel] = field(default_factory=dict)
    clouds: Mapping[str, CloudModel] = field(default_factory=dict)

    def carried(self, requests: tuple[Request, ...]) -> float:
        """The share of the requests' work that the engines can carry together, in the time from the first arrival to
        the last. Work is counted in engine-seconds at best (`EngineModel.least_s`). Raises TraceError where there is no
        engine, or no such time."""
        span = requests[-1].arrival_s - requests[0].arrival_s
        if not self.engines or span <= 0:
            raise TraceError("--local-share needs an engine, and requests that do not all arrive at once")
        return sum(
            span / sum(engine.least_s(r.prompt_tokens, r.output_tokens) for r in requests)
            for engine in self.engines.values()
        )

    def sized(self, requests: tuple[Request, ...], share: float) -> FleetModel:
        """The same fleet with engines of such a speed that they carry this share: every step of every engine gets
        slower or faster by the same factor; the cache stays as it is. Raises what `carried` does."""
        factor = self.carried(requests) / share
        return replace(self, engines={name: engine.slowed(factor) for name, engine in self.engines.items()})


def simulated(policy: Policy, fleet: FleetModel) -> Policy:
    """The policy with its deployments as they are in the simulation: those of the fleet are there, whatever the
    environment lacks, with their engine's window; the others are not. Raises TraceError where a price is not known."""
    for deployment in policy.deployments.values():
        name = deployment.name
        if name in fleet.engines:
            engine = fleet.engines[name]
            window = engine.capacity if deployment.window is None else min(deployment.window, engine.capacity)
            deployment = replace(deployment, window=window, unavailable=None)
        elif name in fleet.clouds:
            deployment = replace(deployment, unavailable=None)
        else:
            deployment = replace(deployment, unavailable="it is not in the fleet model")
        if deployment.unavailable is None and deployment.price is None:
            raise TraceError(f'what "{name}" costs is not known: state its cost in the deployments file')
        policy = policy.with_deployment(deployment)
    return policy


def described_engine(text: str, read: Read) -> EngineModel:
    """The engine that `--engine` names: MODEL@HARDWARE or MODEL@HARDWARE/QUANTIZATION of the catalog, or a calibration
    file. Raises TraceError."""
    if "@" not in text:
        return of_calibration(text, read(text))
    model, _, device = text.partition("@")
    device, _, quantization = device.partition("/")
    return _from_catalog(model, device, quantization or "bf16", 1)


def _from_catalog(model: str, device: str, quantization: str, count: int, **limits: int) -> EngineModel:
    if quantization not in QUANTIZATIONS:
        raise TraceError(f'"{quantization}" is no quantization; known are {", ".join(QUANTIZATIONS)}')
    exact: Quantization = next(known for known in QUANTIZATIONS if known == quantization)
    try:
        plan = Roofline.of(architecture(model), hardware(device), exact, count)
    except (UnknownArchitecture, UnknownHardware, DoesNotRun) as error:
        raise TraceError(str(error)) from None
    return of_roofline(plan, **limits)


class _QuantilesShape(Shape):
    p50: Seconds | None = None
    p95: Seconds | None = None


class _OutageShape(Shape):
    from_: Annotated[Seconds | None, Field(alias="from")] = None
    for_: Annotated[Seconds | None, Field(alias="for")] = None


class _EngineShape(Shape):
    calibration: Text | None = None
    model: Text | None = None
    hardware: Word | None = None
    quantization: Word | None = None
    count: Count | None = None
    max_batch_tokens: Tokens | None = None
    max_running: Tokens | None = None
    max_waiting: Tokens | None = None
    max_waiting_tokens: Tokens | None = None
    slowed: Annotated[float | None, Field(gt=0)] = None


class _CloudShape(Shape):
    first_token: _QuantilesShape | None = None
    per_token: _QuantilesShape | None = None
    per_1000_prompt_tokens: Seconds | None = None
    requests_per_minute: Tokens | None = None
    tokens_per_minute: Tokens | None = None
    outages: list[_OutageShape] | None = None
    fails_after: Seconds | None = None
    failures: Share | None = None


class _FleetShape(Shape):
    required = ("version",)

    version: Version | None = None
    engines: dict[Word, Any] | None = None
    clouds: dict[Word, Any] | None = None


def fleet_model(policy: Policy, engine: EngineModel | None, file: str | None, read: Read) -> FleetModel:
    """The fleet of a policy's deployments: as the fleet file says (`file` is its path, None without one), engines as
    `engine` where it says nothing of them, and clouds as `CloudModel` has them by default. Raises TraceError."""
    stated = FleetModel() if file is None else _Reading(policy, file, read).fleet()
    engines, clouds = dict(stated.engines), dict(stated.clouds)
    for deployment in policy.deployments.values():
        if deployment.name in engines or deployment.name in clouds:
            continue
        if deployment.backend == "local":
            engines[deployment.name] = engine or _engine_of(deployment)
        elif deployment.zone != ON_PREMISES:
            clouds[deployment.name] = CloudModel()
    return FleetModel(engines, clouds)


def _engine_of(deployment: Deployment) -> EngineModel:
    """What an engine that nobody described is taken for: the bundled model on a CPU, where it serves that."""
    if deployment.model != "demo":
        raise TraceError(
            f'nothing says how fast the engine of "{deployment.name}" is: give --engine MODEL@HARDWARE, such as '
            "llama-3.1-8b@h100-80gb, or the file that `hybridgate-engine calibrate` writes"
        )
    return described_engine(BUNDLED, lambda path: "")


class _Reading:
    """A fleet file on its way to a model."""

    def __init__(self, policy: Policy, file: str, read: Read) -> None:
        self._policy = policy
        self._file = file
        self._read = read
        self._problems: list[Problem] = []

    def fleet(self) -> FleetModel:
        root, self._problems = parse(self._file, self._read(self._file))
        engines: dict[str, EngineModel] = {}
        clouds: dict[str, CloudModel] = {}
        if root is not None:
            top = check(_FleetShape, root, "", self._problems.append)
            self._problems += top.missing()
            for name, entry in self._entries(root, "engines", _EngineShape):
                if (engine := self._engine(entry)) is not None:
                    engines[name] = engine
            for name, entry in self._entries(root, "clouds", _CloudShape):
                clouds[name] = self._cloud(entry)
        if self._problems:
            raise TraceError("\n".join(map(str, self._problems)))
        return FleetModel(engines, clouds)

    def _entries(self, root: Node, key: str, shape: type[Any]) -> Iterator[tuple[str, Checked[Any]]]:
        for name, node in root.children(key).items():
            at = root.place_of((key, name), key=True)
            entry = check(shape, node, f'{key[:-1]} "{name}"', self._problems.append, at)
            if name not in self._policy.deployments:
                known = ", ".join(self._policy.deployments)
                self._problems.append(entry.problem(f"the policy has no such deployment; it has {known}"))
            yield name, entry

    def _engine(self, entry: Checked[_EngineShape]) -> EngineModel | None:
        shape = entry.shape
        limits = shape.model_dump(
            include={"max_batch_tokens", "max_running", "max_waiting", "max_waiting_tokens"}, exclude_none=True
        )
        try:
            if shape.calibration is not None:
                engine = of_calibration(shape.calibration, self._read(shape.calibration))
            elif shape.model is not None and shape.hardware is not None:
                sizes = {key: value for key, value in limits.items() if key in ("max_batch_tokens", "max_running")}
                engine = _from_catalog(
                    shape.model, shape.hardware, shape.quantization or "bf16", shape.count or 1, **sizes
                )
            else:
                self._problems.append(entry.problem("must state calibration, or model and hardware"))
                return None
        except TraceError as error:
            self._problems.append(entry.problem(str(error)))
            return None
        engine = replace(engine, **limits)
        return engine if shape.slowed is None else engine.slowed(shape.slowed)

    def _cloud(self, entry: Checked[_CloudShape]) -> CloudModel:
        shape, default = entry.shape, CloudModel()
        return CloudModel(
            first_token=self._quantiles(entry, "first_token", shape.first_token, default.first_token),
            per_token=self._quantiles(entry, "per_token", shape.per_token, default.per_token),
            prompt_s_per_token=(
                default.prompt_s_per_token
                if shape.per_1000_prompt_tokens is None
                else shape.per_1000_prompt_tokens / 1000
            ),
            requests_per_minute=shape.requests_per_minute,
            tokens_per_minute=shape.tokens_per_minute,
            outages=tuple(self._outages(entry, shape.outages or [])),
            fails_after_s=shape.fails_after or default.fails_after_s,
            failure_share=shape.failures or 0.0,
        )

    def _quantiles(
        self, entry: Checked[_CloudShape], key: str, shape: _QuantilesShape | None, default: Quantiles
    ) -> Quantiles:
        if shape is None:
            return default
        if shape.p50 is None or shape.p95 is None or shape.p95 < shape.p50:
            self._problems.append(entry.problem(f'"{key}" must state p50, and p95 that is not less', key))
            return default
        return Quantiles(shape.p50, shape.p95)

    def _outages(self, entry: Checked[_CloudShape], shapes: list[_OutageShape]) -> Iterator[tuple[float, float]]:
        for outage in shapes:
            if outage.from_ is None or outage.for_ is None:
                self._problems.append(entry.problem('an item of "outages" must state from and for', "outages"))
            else:
                yield outage.from_, outage.from_ + outage.for_
