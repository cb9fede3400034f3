"""Models that other programs have fetched onto this machine, read in place and never copied.

For other packages: survey (all of them, in one list), and by program ollama, lm_studio and
hub_cache (find the files of a named model). None of these programs is needed or asked, and nothing
is ever written into their folders.
"""
