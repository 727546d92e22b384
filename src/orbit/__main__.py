"""`python -m orbit`: the command `orbit` of this very Python."""

from __future__ import annotations

import sys

from orbit.cli import main

if __name__ == "__main__":
    sys.exit(main())
