"""What happened: events, counts, and loads shown as they go on.

events: the log that every part publishes to. counters: how many requests ended how. progress: a
display of loads for terminals and applications.
"""
