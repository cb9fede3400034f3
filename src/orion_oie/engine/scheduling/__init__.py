"""A bounded, fair queue of requests. It knows nothing of memory.

queue: the waiting requests, and the threads that serve them. policy, fairness: the choice of the
next one, pure. lines: the structure that it reads. in_flight: the requests being served.
"""
