"""What became of one notification: found in the log, the inbox, the devices' cursors and the dead letters."""
