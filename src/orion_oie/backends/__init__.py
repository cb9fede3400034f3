"""Backends: they answer messages with text.

For other packages: base, the contract. Only `engine/build.py` chooses a backend: llama (llama.cpp
in worker processes), unless the application brings its own. fake is scriptable, for tests of
applications. text (token bytes to whole characters, stop strings) serves the backends. Remote
providers belong in a package beside llama.
"""
