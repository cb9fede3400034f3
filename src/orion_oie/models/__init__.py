"""The models that exist, their files, and the content of these files.

specs: the shapes of models.json. registry: its content, which can be changed. inventory: the
registry beside the files on this machine. quantization: a pure choice among variants. downloads:
files over HTTP. formats: headers of GGUF and safetensors files, read without native code. files:
atomic writes.
"""
