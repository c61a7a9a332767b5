"""Networks by name, from pixels in [0, 1] to logits; their weights, their faster copies, their predictions.

May import `images`, `machine` and `core`.
"""
