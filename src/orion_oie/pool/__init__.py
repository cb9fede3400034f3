"""Which models are in memory, and what for.

pool: the loaded models, with its entries and the pure eviction. variants: which variant of a model
an agent gets. sizes, footprint_ledger: what models take. budget, memory_manager: what they may
take, and what goes under pressure. preloader, prediction: what is loaded ahead of need.
"""
