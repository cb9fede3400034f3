"""The models in memory: which variant of each, how much they may take, and which are evicted.

For other packages: pool (`ModelPool`, the loaded models), variants (the candidates of an agent),
candidate (a model in its variant), files (the files of models as last seen), entries (`Lease`),
memory_manager (budget, sizes and memory pressure of an engine), budget, preloader (loads ahead of
need), background (loads for later requests).

eviction and prediction decide for these, and change nothing. closing ends several models. sizes and
footprint_ledger know how much memory a model takes.
"""
