"""Locks on open files and folders; a lock ends when its descriptor is closed or the process is killed."""

from __future__ import annotations


def take(handle: int, wait: bool = False) -> bool:
    """Lock the open file or folder `handle`; False if another descriptor holds the lock, unless `wait`.

    On a file system without locks this always succeeds, since other holders cannot be detected.
    """
    from filelock import lock_descriptor

    try:
        return lock_descriptor(handle, blocking=wait)
    except OSError:
        return True
