"""What a service that receives Orbit's deliveries embeds, and a reference receiver.

Orbit delivers at least once, each job under one stable id. `verify` checks that a delivery
is genuine and whole; `seen` makes sure that it takes effect once, and `postgres` does so in the
transaction of the effect. `middleware` is all of it for an ASGI application (FastAPI,
Starlette), the reference receiver (`python -m orbit.receiver`) a program of its own. Nothing
here knows Orbit's settings, database or internals, so it can be embedded in any service.
"""

from orbit.receiver.middleware import OrbitDeliveries
from orbit.receiver.postgres import PostgresSeen, claim, create_table, forget
from orbit.receiver.seen import Claim, FileSeen, MemorySeen, Seen, SeenFileInUse, Verdict
from orbit.receiver.verify import (
    BearerInvalid,
    BodyAltered,
    BodyTooLarge,
    Delivery,
    DeliveryRefused,
    DeliverySignature,
    HeaderInvalid,
    IdMissing,
    SignatureInvalid,
    TimestampStale,
    delivery_id,
    read_delivery,
    verify_bearer,
    verify_content_digest,
    verify_delivery,
)

__all__ = [
    "BearerInvalid",
    "BodyAltered",
    "BodyTooLarge",
    "Claim",
    "Delivery",
    "DeliveryRefused",
    "DeliverySignature",
    "FileSeen",
    "HeaderInvalid",
    "IdMissing",
    "MemorySeen",
    "OrbitDeliveries",
    "PostgresSeen",
    "Seen",
    "SeenFileInUse",
    "SignatureInvalid",
    "TimestampStale",
    "Verdict",
    "claim",
    "create_table",
    "delivery_id",
    "forget",
    "read_delivery",
    "verify_bearer",
    "verify_content_digest",
    "verify_delivery",
]
