"""Stage evaluate: a student beside its teacher, and means over many students.

May import `search`, `networks`, `images`, `machine` and `core`.
"""
