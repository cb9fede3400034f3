"""Validation of requests before anything is computed, and sanitizing of answers.

For other packages: requests (size and shape of a question and its options), sanitize (removes
unsafe characters from answers). json_schema, schema_values and gbnf refuse schemas and grammars
that cannot be followed. Detectors of intent or of private data belong in this package.
"""
