"""
Extensions of Twisted's reactor: clock, turn budget, threads, lag, timeouts and one-shot events. Imports no other room.
"""
