"""What the locustfiles are made of: devices, publishers, and the ledger that holds one against the other."""
