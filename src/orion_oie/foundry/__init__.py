"""Makes GGUF files. Knows nothing of the engine.

For other packages: bert_gguf, which writes a GGUF file from a sentence-transformers folder.
bert_folder reads the folder.
"""
