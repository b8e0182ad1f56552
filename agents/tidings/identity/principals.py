"""Whom a token speaks for."""

from __future__ import annotations

from typing import NamedTuple

from .scopes import Scopes

__all__ = ["Caller", "Device"]


class Device(NamedTuple):
    """A user's token: one device, or (None) any device of the user."""

    user: str
    device: str | None
    expires: int
    """Unix seconds."""
    issued: int | None
    """Unix seconds; None when the token does not say."""


class Caller(NamedTuple):
    """A service's token. It opens the HTTP api as far as its scopes go, and never a gateway."""

    name: str
    scopes: Scopes
    expires: int
    """Unix seconds."""
