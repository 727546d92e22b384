"""Phase 4, controlled autonomy: applies what persons approved, on probation, and takes it back.

It does nothing unless both of its switches are on.
"""
