"""The command line: parses, calls the library, prints.

For `python -m orion_oie` and the script `orion-oie`: main, which joins the commands of models, run,
hardware, gguf, route and train. places (the registry and the cache that a command uses), console
(printing) and compatibility (the report of `orion-oie hardware`) support them.
"""
