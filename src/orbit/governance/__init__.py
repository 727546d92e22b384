"""Governance: who may do what, the halt of a namespace, and the rules that it is held to."""
