"""Shards of a sample dataset as they are read: format, manifest, checks, rows, their order.

Files may come from strangers. Writing is in `publish`. May import `search`, `images` and `core`.
"""
