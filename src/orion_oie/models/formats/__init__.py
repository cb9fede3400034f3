"""Headers of weight files, read in Python, so that no native code sees a damaged file.

gguf, safetensors: the readers. cursor, ggml_types: tools of the GGUF reader.
"""
