"""The commands of ``tidings``, one module a group: ``register`` adds their arguments, ``run`` does the work."""
