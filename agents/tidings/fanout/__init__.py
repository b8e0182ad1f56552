"""The fan-out agent: from one message of a topic to a copy for each subscriber."""
