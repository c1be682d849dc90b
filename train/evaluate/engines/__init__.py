"""Engines that decode with a draft: vLLM, transformers, an HTTP server."""
