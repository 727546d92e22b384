"""Governance: the halt of a namespace, and the rules that a namespace is held to."""
