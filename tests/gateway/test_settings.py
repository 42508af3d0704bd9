"""Settings: each is a variable and a flag, and one that cannot be used is named."""

from __future__ import annotations

import pytest

from gateway.settings import Settings, SettingsError, settings_from


def test_settings_come_from_the_environment() -> None:
    given = {
        "HYBRIDGATE_PORT": "9000",
        "HYBRIDGATE_DRAIN_SECONDS": "0.5",
        "HYBRIDGATE_OPEN_TO_NETWORK": "yes",
        "HYBRIDGATE_ADMIN_PORT": "-1",
        "A": "1",
        "HYBRIDGATE_ENGINE_TOKEN": "the engine's, and a deployments file's",
    }
    assert settings_from(given) == Settings(port=9000, admin_port=-1, drain_seconds=0.5, open_to_network=True)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("HYBRIDGATE_PORT", "99999"),
        ("HYBRIDGATE_PORT", "\u0663"),
        ("HYBRIDGATE_PORT", "9" * 5000),
        ("HYBRIDGATE_PORT", "-1"),
        ("HYBRIDGATE_ADMIN_PORT", "-2"),
        ("HYBRIDGATE_ADMIN_PORT", "off"),
        ("HYBRIDGATE_MAX_BODY_BYTES", "0"),
        ("HYBRIDGATE_DRAIN_SECONDS", "nan"),
        ("HYBRIDGATE_DRAIN_SECONDS", "-1"),
        ("HYBRIDGATE_ENGINE_START_SECONDS", "inf"),
        ("HYBRIDGATE_ENGINE_START_SECONDS", "0"),
        ("HYBRIDGATE_OPEN_TO_NETWORK", "maybe"),
        ("HYBRIDGATE_PORTS", "1"),
    ],
)
def test_what_cannot_be_used_is_named_and_not_quoted(name: str, text: str) -> None:
    with pytest.raises(SettingsError, match=name) as caught:
        settings_from({name: text})
    assert "secret" not in str(caught.value) and "99999" not in str(caught.value)
