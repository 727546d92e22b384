"""What people and tools read: cycles and their lineage, slots, dead letters, the overview.

Only reads. Every answer is bounded and costs the same whatever the history's length.
"""
