"""What goes wrong for reasons a user can mend: each is one sentence, shown without a traceback."""


class TrainingError(Exception):
    """One clear sentence: the value, what was expected, what to do."""


class ConfigError(TrainingError, ValueError):
    """A configuration names or sets something that does not exist or does not fit."""


class DataError(ConfigError):
    """An example cannot be read, or is not what the model and the task take."""


class PartitionError(ConfigError):
    """A mesh does not fit the devices, the batch or a parameter."""


class NonFiniteError(TrainingError, FloatingPointError):
    """A loss or gradient was NaN or infinite, and the guard says to stop."""


class StorageError(TrainingError, OSError):
    """The run directory cannot be read or written."""


class CheckpointBroken(StorageError):
    """A checkpoint on disk is not what was saved."""
