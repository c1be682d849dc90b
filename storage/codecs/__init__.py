"""Codecs of hidden states: in numpy and C, and as Zarr v3 codecs."""
