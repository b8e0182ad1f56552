"""What a user would pick instead, beside us: the same loads, on the same machine, in one run. See ``bench/README.md``."""
