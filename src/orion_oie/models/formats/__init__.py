"""Headers of weight files, read in Python, so that native code never sees a damaged file.

For other packages: gguf and safetensors (the readers). cursor and ggml_types belong to the GGUF
reader.
"""
