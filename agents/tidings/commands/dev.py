"""``tidings dev``: the whole mesh in one command."""

from __future__ import annotations

import argparse
import shlex
from typing import TYPE_CHECKING, Final

from tidings.dev.program import program

from .common import DEFAULT_STATE, Commands, add_state, load, run, serve

if TYPE_CHECKING:
    from tidings.dev.mesh import DevMesh

__all__ = ["register"]

_DEFAULT_HTTP: Final = "http://127.0.0.1:8080"
_DEFAULT_NATS: Final = "nats://127.0.0.1:4222"
_LOOPBACK: Final = ("127.0.0.1", "localhost", "::1")
_EVENT: Final = '{"specversion":"1.0","id":"like-1","source":"shell","type":"social.like","data":{"text":"hi"}}'


def register(commands: Commands[argparse.ArgumentParser], common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "dev", parents=[common], help="run everything on this machine", description=_dev.__doc__
    )
    parser.add_argument("--host", help="address of the page, the WebSockets and the HTTP api (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, help="port of the page and the WebSockets, 0 for any (default: 8080)")
    parser.add_argument("--api-port", type=int, help="port of the HTTP api, 0 for any (default: 8081)")
    parser.add_argument("--nats-port", type=_port, default=4222, help="port of NATS, 0 for any (default: 4222)")
    parser.add_argument("--fresh", action="store_true", help="delete what the state folder holds first")
    parser.add_argument(
        "--store",
        metavar="URL",
        help="keep the inbox on a CQL server: cql://host:9042/keyspace, made where it is missing (default: SQLite, in "
        "the state folder; --fresh deletes only what is there)",
    )
    parser.add_argument(
        "--tls",
        action="store_true",
        help="https, wss and NATS with TLS, by certificates of an authority that is made in the state folder",
    )
    add_state(parser)
    parser.set_defaults(run=_dev)


def _port(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) > 65_535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port: write a number from 0 to 65535")
    return int(text)


def _dev(args: argparse.Namespace) -> int:
    """NATS with JetStream, the agents, and a page to try it all, until Ctrl-C. A second start finds
    everything again. For one machine: NATS is open to its users, and the page hands out tokens.
    """
    from tidings.dev.mesh import DevMesh

    settings = load(args, host=args.host, port=args.port, api_host=args.host, api_port=args.api_port)

    async def main() -> int:
        mesh = DevMesh(
            settings, args.state, nats_port=args.nats_port, fresh=args.fresh, store_url=args.store, tls=args.tls
        )
        return await serve(mesh, started=lambda: print(_greeting(mesh, args), flush=True))

    return run(main())


def _greeting(mesh: DevMesh, args: argparse.Namespace) -> str:
    http, nats = mesh.http_url, mesh.nats.url
    state = [] if args.state == DEFAULT_STATE else ["--state", str(args.state)]
    ca = None if mesh.authority is None else str(mesh.authority.ca)
    # What has an authority of its own is found by the state folder, not by an address alone.
    elsewhere = [] if nats == _DEFAULT_NATS else ["--nats", nats]
    to_nats = elsewhere if ca is None else state
    listen = shlex.join([*program(), "listen", "--user", "alice", *state])
    publish = shlex.join(
        [*program(), "publish", "--user", "alice", "--type", "social.like", "--data", '{"text":"hi"}', *to_nats]
    )
    header = "Nats-Msg-Id:alice/like-1"
    trust = [] if ca is None else ["--tlsca", ca]
    plain = shlex.join(["nats", "-s", nats, *trust, "pub", "--jetstream", "-H", header, "notify.user.alice", _EVENT])
    lines = [
        "",
        f"  Page       {http}/",
        f"  WebSocket  ws{http.removeprefix('http')}/v1/ws",
        f"  HTTP api   {mesh.api_url}/v1/docs",
        f"  NATS       {nats}",
        f"  State      {mesh.folder.path}",
        *([] if ca is None else [f"  CA         {ca}", f"             curl --cacert {shlex.quote(ca)} {http}/readyz"]),
        "",
        "  In other terminals:",
        f"    {listen}",
        f"    {publish}",
        "  or, with any NATS client (an id is one notification, however often it is published):",
        f"    {plain}",
        "",
        "  Ctrl-C stops it all; the next start finds everything again.",
    ]
    if {mesh.settings.host, mesh.settings.api_host} - {*_LOOPBACK}:
        lines.append("  Everybody who reaches this address can have a token of any user here.")
    return "\n".join(lines)
