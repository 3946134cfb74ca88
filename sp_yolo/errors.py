"""The errors a user may see. Each carries the exit code of the process that ends with it (listed in docs/faults.md)."""

from __future__ import annotations


class SPYoloError(Exception):
    """Base of every error this package raises on purpose; its message is one line for the user."""

    exit_code = 1


class UserError(SPYoloError):
    """Something the user gave is wrong: a flag, a YAML, a label, a path. Names file, line, value and rule."""

    exit_code = 2


class EnvironmentFault(SPYoloError):
    """The machine cannot do what was asked: a missing package, no such device, not enough memory."""

    exit_code = 3


class NonFiniteError(SPYoloError):
    """A loss, gradient or weight became NaN or infinite; names the quantity and the step."""

    exit_code = 4


class StorageError(SPYoloError):
    """A file could not be written or read back intact: disk full, read-only folder, corrupt checkpoint."""

    exit_code = 5
