"""How good a draft is: by real speculative decoding in ``engines``, or by ``estimate`` from stored features."""
