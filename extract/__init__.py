"""Data set -> token ids and loss mask -> target -> feature store.

``pipeline`` is the way in; ``samples`` reads rows, ``chat`` renders conversations,
``target`` reads the model's files and ``engines`` runs it.
"""
