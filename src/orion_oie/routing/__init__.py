"""Which agent answers.

base: the contract of a router. hybrid: the cascade of stages, with decision (a prompt on its way
through them), explicit, topics, embedding_stage, sessions, residency and tiebreak. keyword: a
router by the hints of the registry alone. text: reads a prompt. linear: the trained model.
evaluation, feedback: how good it is, and what it can learn from.
"""
