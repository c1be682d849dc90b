"""Rotary position embedding: frequencies, the draft's module, what engines build from a config."""
