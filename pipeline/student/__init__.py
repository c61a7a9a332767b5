"""Stage student: where batches come from, and fits of one student by one method.

May import `losses`, `shards`, `training`, `search` and what these import.
"""
