"""Backends: they answer messages with text.

For other packages: base, the contract. llama (llama.cpp in worker processes) is chosen in
`engine/build.py` alone; fake is a scriptable backend for tests of applications. text (token bytes to
whole characters, stop strings) is for backends. Remote providers belong in a package beside llama.
"""
