"""``tidings settings``: every setting, its default and its meaning."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tidings.wire.errors import BadSettings

from .common import Commands

__all__ = ["register"]


def register(commands: Commands[argparse.ArgumentParser], common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser("settings", parents=[common], help="list the settings", description=_settings.__doc__)
    parser.set_defaults(run=_settings)


def _settings(args: argparse.Namespace) -> int:
    """Every setting: its environment variable, default and meaning. In a TOML file: the name alone, in lower case.
    Exit status 1 when the environment or --config has a bad value; each is named on standard error.
    """
    from tidings.runtime.settings import Settings

    rows = [("variable", "default", "meaning"), *Settings.describe()]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    for variable, default, meaning in rows:
        print(f"{variable:<{widths[0]}}  {default:<{widths[1]}}  {meaning}")
    sys.stdout.flush()
    problems = _problems(args.config)
    for problem in problems:
        print(f"tidings: {problem}", file=sys.stderr)
    return 1 if problems else 0


def _problems(file: Path | None) -> list[str]:
    """Of all values, those included that an agent reads only when it starts."""
    from tidings.identity.rules import Entitlement
    from tidings.identity.web import check_url
    from tidings.runtime.settings import Settings
    from tidings.schema import Schemas
    from tidings.store.factory import open_store_url

    values, problems = Settings.examine(file=file)
    readers: tuple[tuple[str, Callable[[str], object]], ...] = (
        ("store_url", open_store_url),
        ("subscribe_rules", Entitlement),
        ("schema_dir", lambda folder: Schemas.load(Path(folder) if folder else None)),
        *((name, partial(check_url, name)) for name in ("token_jwks_url", "subscribe_callback_url") if values[name]),
    )
    for name, reader in readers:
        try:
            reader(values[name])
        except BadSettings as error:
            problems.append(str(error))
    return problems
