"""Parts: immutable Zarr groups, written once and read row by row."""
