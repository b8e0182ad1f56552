"""``POST /v1/revocations``: tokens of a user, or of one of the user's devices, count no more."""

from __future__ import annotations

from aiohttp import web

from tidings.stream import revocations
from tidings.wire.subject import escape

from .answers import nothing
from .backing import Backing
from .bodies import json_body, members, parameters, text
from .gate import Call
from .problems import located

__all__ = ["Revoking"]


class Revoking:
    """The handlers."""

    def __init__(self, backing: Backing) -> None:
        self._backing = backing

    async def revoke(self, call: Call) -> web.Response:
        """Durable when answered; in force on every gateway and api agent within two seconds."""
        parameters(call.request)
        document = await json_body(call.request, self._backing.settings)
        given = members(document, (), required=("user",), optional=("device",))
        user = text(given["user"], ("user",))
        device = text(given["device"], ("device",)) if "device" in given else None
        with located(("user",)):
            escape(user)
        if device is not None:
            with located(("device",)):
                escape(device, "device id")
        await revocations.revoke(self._backing.connection, user, device)
        return nothing()
