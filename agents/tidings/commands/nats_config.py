"""``tidings topology nats-config``: a nats-server's accounts, users and permissions, and everybody's key."""

from __future__ import annotations

import argparse
import os
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tidings.wire.errors import BadSettings

from .common import Commands, load

if TYPE_CHECKING:
    from tidings.stream.keys import Keys
    from tidings.stream.roles import Publisher

__all__ = ["register"]

_ACCOUNTS: Final = "accounts.conf"
_SERVER: Final = "nats-server.conf"


def register(actions: Commands[argparse.ArgumentParser], common: argparse.ArgumentParser) -> None:
    parser = actions.add_parser(
        "nats-config",
        parents=[common],
        help="write a nats-server's accounts and permissions, and a key for each who signs in",
        description=_nats_config.__doc__,
    )
    parser.add_argument("folder", metavar="DIR", type=Path, help="where the configuration and the keys are")
    parser.add_argument(
        "--publisher",
        metavar="SPEC",
        action="append",
        default=[],
        help="a service that publishes over NATS, and to whom: NAME:user:USER or NAME:topic:TOPIC, more behind commas, "
        "such as shop:user:*,topic:shop.> (repeatable)",
    )
    parser.add_argument(
        "--publishers",
        metavar="FILE",
        type=Path,
        help='TOML file of services: a table each, such as [shop], with users = ["*"] and topics = ["shop.>"]',
    )
    for option, text in (
        ("--rotate", "make a new key for this role or publisher; the one before is let in until --retire"),
        ("--retire", "let the key before the last --rotate in no more; with --rotate: no earlier key at all"),
        ("--remove", "forget a publisher that is no longer given, and delete its key"),
    ):
        parser.add_argument(option, metavar="NAME", action="append", default=[], help=text)
    parser.set_defaults(run=_nats_config)


def _nats_config(args: argparse.Namespace) -> int:
    """Write accounts.conf, with what each agent and publisher may do, and a key for each where there is none. A first
    run writes a nats-server.conf that includes it, too. For the number of partitions that the settings name.
    """
    from tidings.stream.accounts import accounts, server
    from tidings.stream.keys import Keys
    from tidings.stream.roles import SYSTEM, agents

    partitions = load(args).partitions
    publishers = _publishers(args.publishers, args.publisher)
    keys = Keys(args.folder)
    names = {role.name: role.name for role in agents(partitions)} | {SYSTEM: SYSTEM}
    names |= {publisher.name: publisher.key for publisher in publishers}
    _refuse_forgotten(keys, {*names, *args.remove})
    _change(keys, names, args)
    made = [key for key in names.values() if keys.make(key)]
    text = accounts(partitions, publishers, {key: keys.public(key) for key in names.values()})
    _replace(args.folder / _ACCOUNTS, text)
    config = args.folder / _SERVER
    if not config.exists():
        _replace(config, server())
    _report(args.folder, partitions, keys, made, publishers)
    return 0


def _publishers(file: Path | None, given: Sequence[str]) -> list[Publisher]:
    from tidings.stream.roles import Publisher

    found = [] if file is None else [_of_table(file, name, table) for name, table in _read(file).items()]
    found += map(Publisher.parse, given)
    names = [publisher.name for publisher in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise BadSettings(f"the publisher {twice} is there twice: say in one place all that it may publish to")
    return found


def _read(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text())
    except OSError as error:
        raise BadSettings(f"the file of publishers {file} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadSettings(f"the file of publishers {file} is not TOML: {error}") from None


def _of_table(file: Path, name: str, table: Any) -> Publisher:
    from tidings.stream.roles import Publisher

    known = {"users", "topics"}
    if not isinstance(table, dict) or table.keys() - known:
        raise BadSettings(f'{file}: {name} must be a table with users and topics alone, such as users = ["*"]')
    for key, values in table.items():
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise BadSettings(f'{file}: {key} of {name} must be a list of texts, such as {key} = ["alice"]')
    return Publisher(name, tuple(table.get("users", ())), tuple(table.get("topics", ())))


def _change(keys: Keys, names: dict[str, str], args: argparse.Namespace) -> None:
    from tidings.stream.roles import PUBLISHER_KEY

    for name in dict.fromkeys((*args.rotate, *args.retire)):
        change = keys.replace if name in args.retire else keys.rotate
        if name not in args.rotate:
            change = keys.retire
        change(names.get(name, name))
    for name in args.remove:
        if name in names:
            raise BadSettings(f"{name} is an agent, or a publisher that is given: it cannot be removed as well")
        keys.remove(PUBLISHER_KEY + name)


def _refuse_forgotten(keys: Keys, known: set[str]) -> None:
    """Whoever forgets an option must not lock a service out."""
    from tidings.stream.roles import PUBLISHER_KEY

    for key in keys.names():
        name = key.removeprefix(PUBLISHER_KEY)
        if key != name and name not in known:
            raise BadSettings(
                f"the publisher {name} has a key ({keys.file(key)}) and is not given: give it with --publisher or in "
                f"--publishers, or forget it with --remove {name}"
            )


def _replace(file: Path, text: str) -> None:
    """Whole or not at all: a server may read it at any moment."""
    new = file.with_name(f".{file.name}.new")
    new.write_text(text)
    with new.open("rb") as written:
        os.fsync(written.fileno())
    new.replace(file)


def _report(folder: Path, partitions: int, keys: Keys, made: Sequence[str], publishers: Sequence[Publisher]) -> None:
    print(f"{folder / _ACCOUNTS}: who may do what, for {partitions} partitions")
    print(f"{folder / _SERVER}: includes it; yours to change")
    for key in made:
        print(f"{keys.file(key)}: a new key")
    for publisher in publishers:
        print(f"publisher {publisher.name} may publish to {', '.join(line.subject for line in publisher.subjects())}")
    print(
        f"Start nats-server -c {folder / _SERVER}, or have the running ones read it: nats-server --signal reload.\n"
        "Each program gets its own key alone, as TIDINGS_NATS_CREDENTIALS: `tidings gateway` has gateway.nk; "
        "`topology`, `doctor`, `user` and the like have operator.nk."
    )
