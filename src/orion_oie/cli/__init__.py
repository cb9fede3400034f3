"""The command line: parses, calls the library, prints.

main: the commands. route, train: those under `orion-oie route`. console: what they share.
compatibility: what the machine offers, as a report.
"""
