"""What ``locust --help`` says under "tidings"; every value is in the form of the web page, too."""

from __future__ import annotations

from typing import Any

from locust.argument_parser import LocustArgumentParser

__all__ = ["add_options"]


def add_options(parser: LocustArgumentParser, **_: Any) -> None:
    """For Locust's event `init_command_line_parser`."""
    group = parser.add_argument_group("tidings", "The mesh under load, and what load it is.")
    add = group.add_argument
    add("--state", metavar="DIR", default=".tidings", help="state folder of the `tidings dev` under load")
    add("--gateway", metavar="URL", default="", help="WebSocket of another mesh: wss://host/v1/ws")
    add("--api", metavar="URL", default="", help="HTTP api of that mesh")
    add("--nats", metavar="URL", default="", help="NATS of that mesh (or TIDINGS_NATS_URL)")
    add("--ca", metavar="FILE", default="", help="what certificates of gateway and api are checked against")
    add("--rate", type=float, default=5.0, help="notifications a second of each publishing user")
    add("--size", type=int, default=200, help="bytes of filling in each notification")
    add("--load-topics", type=int, default=20, help="topics that devices follow, the first by far the most")
    add("--online", type=float, default=20.0, help="seconds that a device stays as it is, on average")
    add("--offline", type=float, default=10.0, help="seconds of an offline phase, on average")
    add("--storm-every", type=float, default=60.0, help="seconds between two storms (storm.py)")
    add("--crowd", type=int, default=0, help="followers without a device that a celebrity has in `tidings dev` as well")
    add(
        "--settle", type=float, default=60.0, help="seconds after the end in which devices may fetch what they are owed"
    )
    add(
        "--overdue",
        type=float,
        default=0.0,
        help="seconds after which what an online device is owed is a failure; 0: never",
    )
    add("--max-p99-ms", type=float, default=0.0, help="a p99 of deliveries above it fails the run; 0: any is good")
    add("--clock-margin", type=float, default=1.0, help="seconds by which clocks of worker machines may differ")
