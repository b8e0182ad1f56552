"""One topic that everybody follows. ``--crowd 2000`` makes it a broadcast in `tidings dev` with few devices, too."""

from __future__ import annotations

from tidings_load.run import register
from tidings_load.users import Celebrity, Followers

__all__ = ["Celebrity", "Followers"]

register()
