"""The whole mesh in one process, for development: nats-server as a child, SQLite, the agents and a page."""
