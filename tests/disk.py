"""A disk that fails when a test says so."""

import builtins
import errno
import os

import pytest


def fail_calls(patch: pytest.MonkeyPatch, failing) -> list[str]:
    """Let the calls whose numbers are in `failing` fail; the list returned grows with each call."""
    made = []

    def fail_or(real):
        def call(*args, **kwargs):
            made.append(real.__name__)
            if len(made) - 1 in failing:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*args, **kwargs)

        return call

    for name in ("mkdir", "rename", "replace", "fsync", "unlink", "rmdir"):
        patch.setattr(os, name, fail_or(getattr(os, name)))
    patch.setattr(builtins, "open", fail_or(open))
    return made
