"""In which networks addresses lie."""

from __future__ import annotations

import pytest

from gateway.networks import PRIVATE, Networks, literal


@pytest.mark.parametrize(
    ("address", "private"),
    [
        ("127.0.0.2", True),
        ("10.4.0.17", True),
        ("172.31.255.255", True),
        ("172.32.0.0", False),
        ("100.64.0.1", True),
        ("203.0.113.5", False),
        ("::1", True),
        ("fd12::7", True),
        ("fe80::1%eth0", True),
        ("2001:db8::1", False),
        ("::ffff:10.0.0.1", True),
        ("::ffff:8.8.8.8", False),
    ],
)
def test_private_networks_hold_what_leads_nowhere_else(address: str, private: bool) -> None:
    assert Networks(PRIVATE).hold(address) is private
    assert Networks(()).hold(address)


def test_what_is_no_network_is_refused() -> None:
    for text in ("10.0.0.1/8", "engines", "10.0.0.0/33"):
        with pytest.raises(ValueError):
            Networks([text])


def test_an_address_is_told_from_a_name() -> None:
    assert [literal(host) for host in ("10.0.0.1", "::1", "localhost", "")] == ["10.0.0.1", "::1", None, None]
