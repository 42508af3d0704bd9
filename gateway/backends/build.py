"""From a deployment's declaration to the backend that calls it.

Owns whom an https address is trusted by, and what of the environment reaches a connection. Refuses to open one: that
happens at the first call.
"""

from __future__ import annotations

import ssl

import certifi

from gateway.backends.base import Backend
from gateway.backends.cloud import CloudBackend, CloudLibrary
from gateway.backends.openai import OpenAIBackend
from gateway.backends.upstream import AiohttpUpstream
from gateway.types import ON_PREMISES, Deployment


def backend_of(
    deployment: Deployment, uds: str | None, authorities: ssl.SSLContext | None, library: CloudLibrary
) -> Backend:
    """The backend that a deployment's declaration asks for. `uds`: the Unix socket of one that is served locally;
    `authorities`: what `authorities_of` found."""
    if deployment.backend == "litellm":
        return CloudBackend(deployment, library)
    connect = deployment.timeouts.connect
    if uds is not None:
        return OpenAIBackend(deployment, AiohttpUpstream("http://engine/v1", connect=connect, uds=uds))
    url = deployment.urls[0] if deployment.urls else "http://unconfigured.invalid"
    trust_env = deployment.zone != ON_PREMISES
    return OpenAIBackend(
        deployment, AiohttpUpstream(url, connect=connect, trust_env=trust_env, authorities=authorities)
    )


def authorities_of(deployment: Deployment) -> ssl.SSLContext | None:
    """Whom to trust for an https address; on premises that is never what the environment says. None where there is
    nothing to say: no https, or the system's. Reads files: raises OSError where the deployment's cannot be read."""
    if deployment.backend == "litellm" or not any(url.startswith("https:") for url in deployment.urls):
        return None
    if deployment.ca_file is not None:
        return ssl.create_default_context(cafile=deployment.ca_file)
    return ssl.create_default_context(cafile=certifi.where()) if deployment.zone == ON_PREMISES else None
