"""The one exception class of the package."""


class QATError(ValueError):
    """A model, argument or file that ``qat`` cannot work with.

    The message names the module path or the argument and says what to do about it.
    """
