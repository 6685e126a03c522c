"""Processes of other processes."""

import psutil


def is_running(number: int) -> bool:
    """Whether there is such a process; one that has ended may stay until somebody asks how it ended."""
    try:
        return psutil.Process(number).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
