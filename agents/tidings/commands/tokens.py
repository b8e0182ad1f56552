"""``tidings token`` and ``tidings revoke``: who may come in, and who may no more."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Final

from tidings.wire.errors import BadSettings, StartFailed

from .common import Commands, add_nats, add_state, duration, load, load_where, run

if TYPE_CHECKING:
    from tidings.runtime.settings import Settings

__all__ = ["DEFAULT_TTL_S", "register", "sign"]

DEFAULT_TTL_S: Final = 3600


def register(commands: Commands[argparse.ArgumentParser], common: argparse.ArgumentParser) -> None:
    token = commands.add_parser(
        "token", parents=[common], help="print a token of a user or a service", description=_token.__doc__
    )
    whose = token.add_mutually_exclusive_group(required=True)
    whose.add_argument("--user", help="whom the token speaks for")
    whose.add_argument("--service", metavar="NAME", help="the service that it is for")
    token.add_argument("--device", help="the one device of the user that it is for (default: any)")
    token.add_argument("--scope", help="what the service may do, such as 'publish:user inbox:read'")
    token.add_argument(
        "--ttl", type=duration, default=DEFAULT_TTL_S, help="how long it is valid: 90s, 15m, 1h, 7d (default: 1h)"
    )
    add_state(token)
    token.set_defaults(run=_token)
    revoke = commands.add_parser(
        "revoke", parents=[common], help="refuse the tokens that a user has", description=_revoke.__doc__
    )
    revoke.add_argument("--user", required=True, help="whose tokens")
    revoke.add_argument("--device", help="of this device alone (default: of all)")
    add_nats(revoke)
    add_state(revoke, default=None)
    revoke.set_defaults(run=_revoke)


def _token(args: argparse.Namespace) -> int:
    """Print a token (JWT), and nothing else. It is signed with the key of a state folder, or where that has none, with
    the first secret of the setting token_key.
    """
    settings = load(args)
    if args.service is None:
        if args.scope is not None:
            raise BadSettings("--scope is for --service: what a user may do needs no scope")
        print(sign(args, settings, args.ttl))
        return 0
    from tidings.identity import issue_service

    if args.scope is None or args.device is not None:
        raise BadSettings("--service needs --scope, which says what it may do, and has no --device")
    key, names = _key(args, settings)
    print(issue_service(key, args.service, args.scope, _checked(args.ttl, settings), **names))
    return 0


def sign(args: argparse.Namespace, settings: Settings, ttl_s: int) -> str:
    """A token for ``--user`` and ``--device``, with the key of ``--state`` or of the settings."""
    from tidings.identity import issue

    key, names = _key(args, settings)
    return issue(key, args.user, args.device, _checked(ttl_s, settings), **names)


def _key(args: argparse.Namespace, settings: Settings) -> tuple[str, dict[str, str]]:
    """What to sign with, and the issuer and audience that agents with this key want; `tidings dev` wants none."""
    from tidings.dev.state import read_key
    from tidings.runtime.settings import listed

    try:
        return read_key(args.state), {}
    except StartFailed:
        if not settings.token_key:
            raise
    audience = next(iter(listed(settings.token_audience)), "")
    return settings.token_key, {"issuer": settings.token_issuer, "audience": audience}


def _checked(ttl_s: int, settings: Settings) -> int:
    if ttl_s > settings.token_ttl_max_s:
        raise BadSettings(
            f"a token may live for {settings.token_ttl_max_s} s at most: give a shorter --ttl, or set "
            "TIDINGS_TOKEN_TTL_MAX_S here and at all agents"
        )
    return ttl_s


def _revoke(args: argparse.Namespace) -> int:
    """Refuse every token that was issued to a user, or to one device of a user, up to now. Their sessions end on every
    gateway within two seconds, also on those that start later. Tokens that are issued from now on are good.
    """
    return run(_publish(load_where(args), args.user, args.device))


async def _publish(settings: Settings, user: str, device: str | None) -> int:
    from tidings.stream.connection import connect
    from tidings.stream.revocations import revoke

    connection = await connect(settings, "tidings-revoke")
    try:
        await revoke(connection, user, device)
    finally:
        await connection.finish()
    whose = f"{user}" if device is None else f"{user} on {device}"
    print(f"revoked: what was issued to {whose} until now is refused on every gateway within 2 s")
    return 0
