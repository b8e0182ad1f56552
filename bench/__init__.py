"""What we measure: the personal path, from a publish to an acknowledged notification. See ``bench/README.md``."""
