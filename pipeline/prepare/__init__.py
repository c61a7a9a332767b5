"""Stage prepare: from a dataset by name to prepared files.

May import `images`, `machine` and `core`.
"""
