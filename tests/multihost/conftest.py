"""The unit tests' small checkpoints, here too."""

from tests.unit.conftest import tiny_cache, tiny_source

__all__ = ["tiny_cache", "tiny_source"]
