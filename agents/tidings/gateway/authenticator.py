"""Who may be here: a token is looked at when a device comes, when it shows a new one, and when some are revoked."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from tidings.identity import Caller, Device, Verifier
from tidings.stream.revocations import Revocation, Revocations
from tidings.wire import codes, frames
from tidings.wire.errors import NotAllowed, NotAuthenticated

if TYPE_CHECKING:
    from .hub import Hub
    from .session import Session

__all__ = ["Authenticator"]

_REVOKED = "the token was revoked: sign in again"

log = logging.getLogger("tidings.gateway")


class Authenticator:
    """Decides by keys and revocations; `revoked` is what `Revocations` is to call."""

    def __init__(self, hub: Hub, verifier: Verifier) -> None:
        self._hub = hub
        self._verifier = verifier
        self.revocations = Revocations(hub.connection, hub.settings, self.revoked)

    async def identify(self, token: str) -> Device:
        """Whom a token speaks for. Raises `NotAuthenticated`, `KeysUnavailable`, and `NotAllowed` for a service's."""
        who = await self._verifier.verify(token)
        if isinstance(who, Caller):
            raise NotAllowed("the token is a service's: a device needs a user's")
        return who

    def check(self, who: Device, device: str) -> None:
        """Raise `NotAuthenticated` when the token was revoked. What passes is for this turn of the loop."""
        if self.revocations.refuse(who.user, device, who.issued):
            raise NotAuthenticated(_REVOKED)

    async def renew(self, session: Session, token: str) -> Device:
        """Look at the new token of an attached session; raises what `identify` and `check` raise.

        It must be for the same user and device: `NotAllowed` otherwise.
        """
        who = await self.identify(token)
        if who.user != session.user or who.device not in (None, session.device):
            raise NotAllowed("the token is for another user or device than the one before")
        self.check(who, session.device)
        return who

    def revoked(self, new: Revocation) -> None:
        """End the sessions of tokens that count no more, those that wait for their client included."""
        for session in list(self._hub.users.get(new.user, ())):
            who = session.identity
            if who is None or new.device not in (None, session.device):
                # One that has nobody yet is looked at when somebody comes in.
                continue
            if who.issued is None or who.issued <= new.at:
                log.info("session %s ends: its token was revoked", session.id)
                farewell = frames.error(codes.NOT_AUTHENTICATED.name, _REVOKED)
                self._hub.close_socket(session, codes.NOT_AUTHENTICATED, farewell)
                self._hub.end(session)
