"""Whose turn it is: a bounded, fair queue that knows no memory.

queue: who waits, and the threads that serve. policy, fairness: pure, who is next. in_flight: what
is being served.
"""
