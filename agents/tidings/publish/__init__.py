"""Publishing: the Python SDK for services that speak NATS."""

from .publisher import Event, Publisher, Receipt

__all__ = ["Event", "Publisher", "Receipt"]
