"""Which models exist, where their files are, and what is in them.

specs, registry: models.json, as shapes and as an object that can be changed. inventory: what of it
is on this machine. quantization: pure, which variant suits. downloads: files over HTTP. formats:
headers of GGUF and safetensors files, read without native code.
"""
