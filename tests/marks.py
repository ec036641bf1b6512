"""For tests that are on their way; moved to `tests.support.marks`."""

from tests.support.marks import *  # noqa: F403
