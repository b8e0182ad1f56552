"""What every agent needs to run: settings, a lifecycle, back-off, logging."""
