"""The catalogue of codes, and the file that is made from it."""

from __future__ import annotations

import json
from pathlib import Path

from tidings.wire import codes

FILE = Path(__file__).parents[2] / "schemas" / "codes.json"


def test_the_file_is_the_catalogue() -> None:
    """`schemas/codes.json` is what `wire/codes.py` says."""
    assert json.loads(FILE.read_text()) == codes.catalogue(), (
        "schemas/codes.json is stale: python -c 'import json; from tidings.wire.codes import catalogue; "
        "print(json.dumps(catalogue(), indent=2))' > schemas/codes.json"
    )


def test_codes_are_unique() -> None:
    """No code and no name stands twice."""
    assert (
        len({close.code for close in codes.CLOSES}) == len({close.name for close in codes.CLOSES}) == len(codes.CLOSES)
    )
    assert len({error.code for error in codes.ERRORS}) == len(codes.ERRORS)
    assert len({problem.code for problem in codes.PROBLEMS}) == len(codes.PROBLEMS)


def test_who_reconnects() -> None:
    """A code of ours says so; anything else is the network's, and worth another try."""
    assert not codes.reconnects(4409)
    assert codes.reconnects(4503)
    assert codes.reconnects(1006)
    assert codes.reconnects(None)
