"""The one exception family of the package."""


class TensorNetError(ValueError):
    """Bad input or an impossible request; the message quotes what was given, what was expected and what to do."""


class CheckpointError(TensorNetError):
    """A saved folder that cannot be trusted: truncated, of an unknown version, or with tensors that do not fit."""


class TargetError(TensorNetError):
    """A module pattern that matches nothing, or a module that cannot be replaced."""


class BudgetError(TensorNetError):
    """A byte budget that no combination of the offered options can meet."""


class CodeError(TensorNetError):
    """A quantisation step so fine that codes would be too large to store."""


class MissingExtraError(TensorNetError):
    """An optional package is needed for what was asked."""
