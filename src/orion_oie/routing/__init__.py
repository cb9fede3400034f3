"""Choice of the agent that answers a question.

For other packages: base (the contract of a router), hybrid (the default router, a cascade of
stages), tiebreak (its stage that asks a language model), feedback (corrections by users); for
training and measuring, linear (the trained model), evaluation and profiles.

Parts of the hybrid router: candidates (who may answer), attachment, decision (the state of one
route), explicit, topics, embedding_stage, sessions, residency, reasons. keyword is a router that
uses only the hints of the registry. The package text reads a prompt.
"""
