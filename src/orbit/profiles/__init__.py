"""Phase 2: profiles and run profiles, from the files to the instruction that a cycle executes.

Stands on phase 1 (`orbit.execution`), which knows nothing of it.
"""
