"""The HTTP api: publishing for services that do not speak NATS, inbox and subscriptions for web clients."""
