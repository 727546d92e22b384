"""Telemetry: what happened, as events in an order that a reader can keep a place in."""
