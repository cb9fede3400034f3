"""The models in memory.

pool, entries: the loaded models. eviction: the choice of those to evict. variants, candidate,
files: the variant of each model that an agent gets. sizes, footprint_ledger: the memory that models
take. budget, memory_manager: the memory that they may take, and relief under pressure. background,
preloader, prediction: loads ahead of need.
"""
