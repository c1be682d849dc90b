"""Losses of a draft's distribution against the target's, and metrics."""
