"""Orbit: a control plane for unattended work."""

__version__ = "0.1.0"
