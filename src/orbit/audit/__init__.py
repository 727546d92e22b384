"""The audit trail: entries chained by hash, sealed facts, checkpoints, and their verification."""
