"""The making of GGUF files. Knows nothing of the engine.

bert_gguf: a GGUF file from a folder of sentence-transformers, which bert_folder reads.
"""
