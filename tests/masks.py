"""For tests that are on their way; moved to `tests.support.masks`."""

from tests.support.masks import *  # noqa: F403
