"""Precomputed datasets of boundary-supporting samples for knowledge distillation.

The library behind the commands in `stages/`: everything here can be imported, tested and reused, and nothing
here parses a command line.
"""

__version__ = "0.1.0"
