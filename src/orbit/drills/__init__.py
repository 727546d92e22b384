"""Drills: rehearsals of an emergency against the running installation, in a scratch namespace."""
