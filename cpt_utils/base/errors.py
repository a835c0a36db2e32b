"""The one exception for input that a person can mend."""


class InputError(Exception):
    """The input is wrong. The message is one line: what is wrong, and what to do about it."""
