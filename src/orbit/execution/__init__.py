"""Phase 1: a cycle from its initiation through the tiers and normalisation to dispatch.

Knows nothing of profiles: the bridge in `orbit.profiles` hands it a plain execution context.
A stage's output, its checkpoint and its records commit together or not at all.
"""
