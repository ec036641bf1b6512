"""For tests that are on their way; moved to `tests.support.oracle`."""

from tests.support.oracle import *  # noqa: F403
