"""Stores -> batches."""
