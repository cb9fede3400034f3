"""What happened: events, counts, and loads shown as they go on.

events: the catalogue, one class an event. event_log: the log that every part publishes to.
event_docs: docs/events.md. counters: numbers of requests by outcome. progress: a display of loads
for terminals and applications.
"""
