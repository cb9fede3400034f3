"""Headers of weight files, read in Python: nothing native sees a file that is damaged.

gguf, safetensors: readers. cursor, ggml_types: what the GGUF reader works with.
"""
