"""Makes GGUF files.

bert_gguf: from a folder of sentence-transformers, which bert_folder reads. Merging, quantizing,
sharding and validating will be modules beside these. Knows nothing of the engine.
"""
