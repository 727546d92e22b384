"""The audit trail: who did what, and that nobody has changed the record since."""
