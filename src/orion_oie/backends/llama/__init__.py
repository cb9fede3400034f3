"""llama.cpp, in a process of its own for each loaded variant.

host: the side of the application. worker: the side of the process. protocol: what they say to each
other. Only `host.loader.LlamaBackend` is for others.
"""
