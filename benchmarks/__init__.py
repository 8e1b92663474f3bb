"""How fast the daemon is: against the machine's own limits, and against any second server of the same contract."""
