"""Routing: chooses the agent that answers a question.

base: the contract of a router. hybrid: the cascade of stages; decision (the state of one route),
explicit, topics, profiles, embedding_stage, sessions, residency and tiebreak belong to it.
keyword: a router that uses the hints of the registry alone. text: reads a prompt. linear: the
trained model. evaluation: accuracy and calibration. feedback: corrections by users, for training.
"""
