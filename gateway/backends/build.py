"""From a deployment's declaration to the backend that calls it.

Owns whom an https address is trusted by, and what of the environment reaches a connection. Refuses to open one: that
happens at the first call.
"""

from __future__ import annotations

import ssl

import certifi

from gateway.backends.aiohttp_client import AiohttpUpstream, proxy_for
from gateway.backends.base import Backend
from gateway.backends.cloud import CloudBackend, CloudLibrary
from gateway.backends.http1_client import Http1Upstream
from gateway.backends.openai import OpenAIBackend
from gateway.backends.replicated import ReplicatedBackend
from gateway.backends.upstream import Upstream
from gateway.networks import Networks
from gateway.types import ON_PREMISES, Deployment, Replica


def backend_of(
    deployment: Deployment, uds: str | None, authorities: ssl.SSLContext | None, library: CloudLibrary
) -> Backend:
    """The backend that a deployment's declaration asks for. `uds`: the Unix socket of one that is served locally;
    `authorities`: what `authorities_of` found."""
    if deployment.backend == "litellm":
        return CloudBackend(deployment, library)
    if uds is not None:
        connect = deployment.timeouts.connect
        return OpenAIBackend(deployment, Http1Upstream("http://engine/v1", connect=connect, uds=uds))

    def opened(replica: Replica) -> OpenAIBackend:
        return OpenAIBackend(deployment, upstream_of(deployment, authorities, replica))

    url = deployment.urls[0] if deployment.urls else "http://unconfigured.invalid"
    return ReplicatedBackend(opened(Replica(url)), opened)


def upstream_of(deployment: Deployment, authorities: ssl.SSLContext | None, replica: Replica) -> Upstream:
    """The client for an address of the deployment: by way of the environment's proxy where it names one now, but never
    on premises."""
    connect, url = deployment.timeouts.connect, replica.url
    proxy = proxied(deployment, url)
    if proxy is not None:
        return AiohttpUpstream(url, connect=connect, proxy=proxy, authorities=authorities)
    within = Networks(deployment.networks)
    return Http1Upstream(url, connect=connect, authorities=authorities, address=replica.address, within=within)


def proxied(deployment: Deployment, url: str) -> str | None:
    """The environment's proxy by way of which an address of the deployment is reached."""
    return proxy_for(url) if deployment.zone != ON_PREMISES else None


def authorities_of(deployment: Deployment) -> ssl.SSLContext | None:
    """Whom to trust for an https address: the system and what the environment adds, but on premises never what the
    environment says. None where there is no such address. Reads files: raises OSError where the deployment's cannot
    be read."""
    if deployment.backend == "litellm" or not any(url.startswith("https:") for url in deployment.urls):
        return None
    file = deployment.ca_file or (certifi.where() if deployment.zone == ON_PREMISES else None)
    context = ssl.create_default_context(cafile=file)
    context.set_alpn_protocols(["http/1.1"])
    return context
