"""The gateway agent: holds WebSockets, one consumer a session, and what each device has acknowledged."""
