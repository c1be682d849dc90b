"""Real speculative decoding with an exported draft: one file a judge.

``chain`` is our own, in transformers; ``vllm`` is the engine itself. Engines are
imported inside the functions that need them.
"""
