"""Tidings: a self-hosted event mesh for real-time notifications."""

__version__ = "0.1.0"
