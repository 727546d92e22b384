"""Phase 3: signals from what cycles came to, and how far they can be trusted.

Pure: no database, no clock, no source of chance but a seed that is given.
"""
