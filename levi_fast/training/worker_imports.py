"""What the workers' server imports (:mod:`levi_fast.training.workers`): once, for all workers forked from it."""

from levi_fast.startup import importing, quiet_imports

quiet_imports()
with importing():
    import levi_fast.training.sweep  # noqa: F401
