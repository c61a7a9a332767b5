"""Stage attack: from a teacher and images to the shards of a sample dataset.

May import `publish`, `shards`, `search` and what these import.
"""
