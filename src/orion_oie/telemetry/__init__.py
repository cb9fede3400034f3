"""Reports of what an engine does: events, counts, and a display of loads.

For other packages: events (the catalogue, one class for each event), event_log (keeps events and
hands them to subscribers), callbacks (calls of code that may raise anything), counters (numbers of
requests, by outcome), progress (loads as a bar or as lines), event_docs (the text of
docs/events.md).
"""
