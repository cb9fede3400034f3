"""What may come in, and what may go out.

requests: shape and size of a question and its options. json_schema, gbnf: which schemas and
grammars are refused before anything runs. sanitize: characters that an answer must not carry.
Detectors of intent or of private data will be modules beside these.
"""
