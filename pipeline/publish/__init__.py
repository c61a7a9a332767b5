"""Sample datasets as they are written: shards, their card, and new datasets from finished ones.

May import `shards`, `search` and `core`.
"""
