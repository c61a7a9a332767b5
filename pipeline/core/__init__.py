"""The ground: errors, parameters, whole files, the store of finished work, fingerprints.

Imports nothing of the project but itself, and no torch.
"""
