"""The order of requests: a bounded, fair queue that knows neither memory nor models.

For the engine: queue (the waiting requests, and the threads that serve them). Its parts: policy,
ranking and fairness (which request is next; all are pure), lines (the waiting requests, by model),
forecast, ahead, moment and places (the order of all that wait), history (what was served),
in_flight (the requests that are being served), seats (the lock and the sleeping places of its
threads).
"""
