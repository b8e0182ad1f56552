"""What a user would pick instead, beside us: the same loads, one machine, one run. See ``bench/README.md``."""
