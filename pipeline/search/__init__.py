"""Boundary searches: from an image to a sample on the decision boundary between two classes.

`boundary` has what all searches share, `newton` is the default one, `table` knows them by name. A search knows no
files. May import `networks`, `images`, `machine` and `core`.
"""
