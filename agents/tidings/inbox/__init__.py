"""The inbox agent: writes every notification to the store, then acknowledges it."""
