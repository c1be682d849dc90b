"""The feature store: immutable Zarr parts, made visible by commit records.

Speaks numpy and knows no model. ``store`` opens or creates one, ``writer`` adds
sequences, ``reader`` gives them back, ``verify`` reads every byte.
"""
