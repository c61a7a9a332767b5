"""Stage evaluate: a student beside its teacher, means over many students, and what networks cost.

May import `search`, `networks`, `images`, `machine` and `core`.
"""
