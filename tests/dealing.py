"""How tests are dealt out to workers (`make test JOBS=4`): one by one, so that none waits long.

The tests of some files share what takes long to make, a project, a big database, an image: such a
file goes to one worker, and first.
"""

from __future__ import annotations

from xdist.scheduler import LoadScopeScheduling  # type: ignore[import-untyped]

TOGETHER = frozenset(
    {
        "tests/database/test_embedded.py",
        "tests/database/test_upgrade.py",
        "tests/database/test_versions.py",
        "tests/delivery/test_image.py",
        "tests/delivery/test_package.py",
        "tests/plans/test_hot_plans.py",
        "tests/scenario/test_cli.py",
    }
)


class Dealing(LoadScopeScheduling):  # type: ignore[misc]
    """Gives a worker a test, or a file of those that stay together."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return file if file in TOGETHER else nodeid
