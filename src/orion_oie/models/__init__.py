"""The models that exist, their files, and the headers of these files.

For other packages: specs (the types of models.json), registry (its content, which can be changed at
run time), choices (what may answer for an agent), naming and source_names (one text for a model),
quant_choice (the files of a quantization),
split_files (paths of users, checked), local (models of other programs), keys (the name of a loaded
model), inventory (the registry beside the files on this machine), quantization (a pure choice among
variants), downloads (files over HTTP), formats (headers of GGUF and safetensors files, read without
native code), files (atomic writes).
"""
