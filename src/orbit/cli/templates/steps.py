"""Your steps: each takes a payload and gives one back; Orbit never looks inside."""

from __future__ import annotations

from orbit.execution.context import ExecutionContext
from orbit.payload import Payload


async def greet(payload: Payload, context: ExecutionContext) -> Payload:
    """Writes a greeting in the profile's style, for the run profile's audience."""
    style, assets = context.instruction["style_vector"], context.instruction["asset_bundle"]
    text = f"{style['greeting']}, {assets['audience']}. This is {context.profile_id}.\n"
    return Payload.of_text(text)
