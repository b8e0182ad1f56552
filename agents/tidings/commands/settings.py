"""``tidings settings``: every setting, its default and its meaning."""

from __future__ import annotations

import argparse

from .common import Commands

__all__ = ["register"]


def register(commands: Commands[argparse.ArgumentParser], common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser("settings", parents=[common], help="list the settings", description=_settings.__doc__)
    parser.set_defaults(run=_settings)


def _settings(args: argparse.Namespace) -> int:
    """Every setting: its environment variable, default and meaning. In a TOML file: the name alone, in lower case."""
    from tidings.runtime.settings import Settings

    rows = [("variable", "default", "meaning"), *Settings.describe()]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    for variable, default, meaning in rows:
        print(f"{variable:<{widths[0]}}  {default:<{widths[1]}}  {meaning}")
    return 0
