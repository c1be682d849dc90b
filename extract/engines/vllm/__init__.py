"""The target in vLLM."""
