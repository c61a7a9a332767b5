"""Losses of distillation: a module each, with its parameters, its function of tensors, and its `Term`.

A method of params.yaml names them by their modules. May import `training` and what it imports.
"""
