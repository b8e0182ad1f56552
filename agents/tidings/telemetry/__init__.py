"""Metrics and traces: what is counted, how it is exported, and what a message's trace is made of."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tidings.runtime.settings import Settings
from tidings.wire.errors import StartFailed

if TYPE_CHECKING:
    from .telemetry import Telemetry

__all__ = ["telemetry_of"]


def telemetry_of(settings: Settings, agent: str) -> Telemetry | None:
    """The telemetry of this process, not started; None where the setting `telemetry` is off.

    Raises `StartFailed` where it is on and OpenTelemetry is not installed.
    """
    if settings.telemetry == "off":
        return None
    try:
        from .telemetry import Telemetry
    except ModuleNotFoundError as error:
        raise StartFailed(
            f"telemetry is on and {error.name} is not installed: pip install 'tidings[otel]', or set telemetry=off"
        ) from None
    return Telemetry(settings, agent)
