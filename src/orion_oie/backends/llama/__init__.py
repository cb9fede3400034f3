"""llama.cpp, in a process of its own for each loaded variant.

For other packages: host.loader (`LlamaBackend`), and host.devices for the command line.

host runs in the application, worker in the process, and protocol has the messages between them.
"""
