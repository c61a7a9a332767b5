"""One fit loop for teacher and students: batches, what is minimised, checkpoints.

May import `networks`, `images`, `machine` and `core`.
"""
