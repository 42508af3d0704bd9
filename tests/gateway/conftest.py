"""Fixtures of several files: a cluster of Redis and one behind a Sentinel, each started once a file."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.redis_server import redis_cluster, redis_sentinel


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a cluster of three nodes."""
    with redis_cluster(tmp_path_factory.mktemp("cluster")) as url:
        yield url


@pytest.fixture(scope="module")
def sentinel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of what a Sentinel watches."""
    with redis_sentinel(tmp_path_factory.mktemp("sentinel")) as watched:
        yield watched.url
