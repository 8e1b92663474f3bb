"""What stands on the reactor alone: turns, threads, its lag, one-shot events, interfaces."""
