"""Addresses of settings, as they are shown and spoken to."""

from __future__ import annotations

import pytest

from tidings.runtime.address import reachable


@pytest.mark.parametrize(
    ("host", "in_url"),
    [
        *(("0.0.0.0", "127.0.0.1"), ("", "127.0.0.1"), ("::", "[::1]"), ("[::]", "[::1]"), ("0:0::0", "[::1]")),
        *(("192.0.2.7", "192.0.2.7"), ("2001:db8::7", "[2001:db8::7]"), ("[::1]", "[::1]")),
        ("n1.example", "n1.example"),
    ],
)
def test_reachable(host: str, in_url: str) -> None:
    """Nobody can connect to the address that stands for all: its machine's own does, and IPv6 has brackets."""
    assert reachable(host) == in_url
