"""What a benchmark raises."""


class WrongResultError(RuntimeError):
    """A contender's result, checked before any time is taken, is further from float64 than it may be."""
