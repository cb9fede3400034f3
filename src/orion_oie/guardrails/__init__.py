"""Guardrails: validation of requests, and sanitizing of answers.

requests: shape and size of a question and its options. json_schema, schema_values, gbnf: schemas
and grammars that are refused before generation. sanitize: characters that are removed from
answers. Detectors of intent or of private data would become modules of this package.
"""
