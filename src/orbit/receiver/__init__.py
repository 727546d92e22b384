"""What a service that receives Orbit's deliveries embeds, and a reference receiver.

Orbit delivers at least once, each job under one stable id. `verify` checks that a delivery
is genuine and whole; `seen` makes sure that it takes effect once. The reference receiver
(`python -m orbit.receiver`) is built from both. Nothing here knows Orbit's settings,
database or internals, so it can be embedded in any service.
"""

from orbit.receiver.seen import FileSeen, MemorySeen, Seen, SeenFileInUse, Verdict
from orbit.receiver.verify import (
    BearerInvalid,
    BodyAltered,
    Delivery,
    DeliveryRefused,
    HeaderInvalid,
    IdMissing,
    delivery_id,
    read_delivery,
    verify_bearer,
    verify_content_digest,
)

__all__ = [
    "BearerInvalid",
    "BodyAltered",
    "Delivery",
    "DeliveryRefused",
    "FileSeen",
    "HeaderInvalid",
    "IdMissing",
    "MemorySeen",
    "Seen",
    "SeenFileInUse",
    "Verdict",
    "delivery_id",
    "read_delivery",
    "verify_bearer",
    "verify_content_digest",
]
