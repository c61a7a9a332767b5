"""Images as arrays: prepared files, views of them, and what a pixel is to a network.

May import `core`.
"""
