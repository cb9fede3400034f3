"""What turns messages into text.

base: the contract, which is all that the packages above may import. llama: llama.cpp in worker
processes. fake: a scriptable one for tests of applications. text: token bytes to whole characters.
Remote providers will be a package beside llama.
"""
