"""The command line: parses, calls the library, prints.

main puts the commands together; models, run, hardware, gguf, route and train are groups of them.
places: the registry and the cache that a command uses. console: printing. compatibility: the report
of `orion-oie hardware`.
"""
