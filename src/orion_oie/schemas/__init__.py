"""The shapes that cross the border of the library, and how they are checked and put into words.

requests, results, loading, plans, stats: immutable data, by subject. base: what they share.
validation: what is wrong with data, in a sentence each. units: sizes in words.
"""
