"""``tidings top``: what a running mesh does now, read from its agents' ``/metrics``."""
