"""Locks on open files and folders, which end with their descriptor: when it is closed, or the process is killed."""

from __future__ import annotations


def take(handle: int, wait: bool = False) -> bool:
    """Lock the open file or folder `handle`; False where another has it, unless one is to `wait` for the other.

    A file system without locks gives every one that is asked for: nobody can be told apart there.
    """
    from filelock import lock_descriptor

    try:
        return lock_descriptor(handle, blocking=wait)
    except OSError:
        return True
