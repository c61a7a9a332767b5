"""Precomputed datasets of boundary-supporting samples for knowledge distillation.

This is the door: what users need is imported from here, and loaded when it is first used; `__init__.pyi` lists it.
Behind it are rooms, one for each stage and one for each thing that stages share. Nothing in them parses a command line.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
