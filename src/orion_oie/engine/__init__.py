"""The orchestrator: the public calls, and the way of one request."""
