"""telemetry_drops: the SQL is in the file of the same name."""

from __future__ import annotations

from pathlib import Path

from orbit.database.upgrade import run_script

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None


def upgrade() -> None:
    run_script(Path(__file__).with_suffix(".sql"))


def downgrade() -> None:
    raise NotImplementedError("facts are never undone: restore a backup instead")
