"""specx: dump a target's features once, train speculative-decoding drafts from them as often as one likes."""

__version__ = "0.1.0"


class SpecxError(Exception):
    """Something a user can cause and mend.

    The message is one line: where, what was found, what was expected, what to do.
    """
