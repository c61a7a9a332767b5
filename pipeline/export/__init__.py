"""Networks as files that run without this project: ONNX, and torch's own exported programs.

May import `networks`, `images`, `machine` and `core`.
"""
