"""The command line: parses, calls the library, prints.

For `python -m orion_oie` and the script `orion-oie`: main, which joins the commands of run, chat,
agents, route, train, models, gguf and hardware. They are supported by places (the registry, the
cache and the model that a command uses), asking (what run and chat share), question (words and
piped texts), completion, groups (help, suggestions), hints (the library's messages in
the words of the command line), console and layout (printing), and compatibility (the report of
`orion-oie hardware`).
"""
