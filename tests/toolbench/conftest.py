"""The small tokenizers of tests/dialogue."""

from dialogue.conftest import codecs, directories

__all__ = ["codecs", "directories"]
