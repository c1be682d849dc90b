"""EAGLE-1 (arXiv 2401.15077)."""
