"""The only code that knows NATS: the connection, the topology, consumers, the bundled server."""
