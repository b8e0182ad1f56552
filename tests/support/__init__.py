"""What the suites share: a mesh of real processes, devices, a ledger, faults with names."""
