"""The one exception for input that the user can correct."""


class InputError(Exception):
    """The input is wrong. The message is one line: what is wrong, and how to correct it."""
