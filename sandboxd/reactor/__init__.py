"""
Extensions of Twisted's reactor: clock, turn budget, threads, lag, timeouts, one-shot events.
"""
