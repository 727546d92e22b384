"""The command `orbit`: what people type, and what their scripts call.

One way to ask: the JSON API, over HTTP where a node answers, else in this process over the
database. Results go to stdout, everything else to stderr. Modules here import only what starts
quickly; what is heavy is imported inside the verb that needs it.
"""

from __future__ import annotations

from orbit.cli.program import main

__all__ = ["main"]
