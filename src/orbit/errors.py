"""Everything that Orbit refuses or fails at, each with a stable code.

An exception here is a broken promise or a refused request; expected outcomes are values.
The code is what users' tools match on (problem documents, `--json`, logs), so it never
changes; the message names the place and says what is accepted. No message carries a secret
or a payload.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar


class OrbitError(Exception):
    """Base of all of Orbit's own errors."""

    code: ClassVar[str] = "orbit_error"

    def __init__(self, message: str, **details: Any) -> None:
        super().__init__(message)
        self.details: Mapping[str, Any] = details


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with the configuration: where it is and what was expected."""

    message: str
    file: str = ""
    line: int | None = None
    pointer: str = ""

    def __str__(self) -> str:
        place = self.file + (f":{self.line}" if self.line else "")
        where = " ".join(part for part in (place, self.pointer) if part)
        return f"{where}: {self.message}" if where else self.message


class SettingInvalid(OrbitError):
    """One or more environment settings cannot be used; the start stops."""

    code = "setting_invalid"


class ConfigurationInvalid(OrbitError):
    """The configuration files cannot be used; carries every problem at once."""

    code = "configuration_invalid"

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("\n".join(map(str, problems)))
        self.problems = tuple(problems)


class DatabaseUnavailable(OrbitError):
    """The database does not answer, or refuses us."""

    code = "database_unavailable"


class SchemaMismatch(OrbitError):
    """The database's schema is older or newer than this program; nothing starts."""

    code = "schema_mismatch"


class EmbeddedServerFailed(OrbitError):
    """The embedded PostgreSQL server cannot be prepared or started."""

    code = "embedded_server_failed"


class AddressInUse(OrbitError):
    """The HTTP address is taken by another process."""

    code = "address_in_use"


class LeaseLost(OrbitError):
    """Another node holds the lease now; what this worker did has no effect."""

    code = "lease_lost"


class PayloadTooLarge(OrbitError):
    """A payload is over the limit; refused before anything is stored."""

    code = "payload_too_large"


class StepFailed(OrbitError):
    """A transformation or normaliser failed after all its attempts."""

    code = "step_failed"


class NotHere(OrbitError):
    """A cycle needs what this node does not have, and another node may: code, or an endpoint."""

    code = "unavailable_here"


class SecretUnreadable(OrbitError):
    """A stored secret cannot be decrypted with the keys at hand."""

    code = "secret_unreadable"


class AuditKeyInvalid(OrbitError):
    """The key that signs or verifies the audit trail's checkpoints cannot be used."""

    code = "audit_key_invalid"


class VerificationImpossible(OrbitError):
    """The audit trail is not stored in a way that this program can verify."""

    code = "verification_impossible"


class ArchiveDamaged(OrbitError):
    """Archived telemetry does not read back as it was written, or cannot be written."""

    code = "archive_damaged"


class Refused(OrbitError):
    """The request is understood and not allowed now (paused, halted, busy, disabled)."""

    code = "refused"


class GlobalPause(Refused):
    """`ORBIT_GLOBAL_PAUSE` is set; no cycle starts."""

    code = "global_pause"


class NamespaceHalted(Refused):
    """The namespace is halted; nothing of it begins."""

    code = "namespace_halted"


class NotHalted(Refused):
    """The namespace is not halted, so there is nothing to resume."""

    code = "not_halted"


class HaltedAnew(Refused):
    """The halt that was to be ended is not the one in force any more."""

    code = "halted_anew"


class SecondPersonRequired(Refused):
    """Another person than the first has to agree."""

    code = "second_person_required"


class OperatorRequired(Refused):
    """Who may only agree to a resumption is not the first to ask for it."""

    code = "operator_required"


class TooManySessions(Refused):
    """A key has, or has just begun, as many sessions or links as one may have."""

    code = "too_many_sessions"


class DrillUnderWay(Refused):
    """This node rehearses already; one drill at a time."""

    code = "drill_under_way"


class CyclesActive(Refused):
    """The configuration cannot change while cycles are active."""

    code = "cycles_active"


class OverlaysBroken(Refused):
    """Overlays do not fit the new files, and nobody said that they may be dropped."""

    code = "overlays_broken"


class AlreadyRequeued(Refused):
    """The dead letter has been requeued before."""

    code = "already_requeued"


class MayHaveArrived(Refused):
    """An attempt of the dead letter may have arrived; sent again, it would be another item."""

    code = "may_have_arrived"


class NotRerunnable(Refused):
    """Only a failed cycle can be run again, and only while no re-run of it has taken over."""

    code = "not_rerunnable"


class AlreadyDecided(Refused):
    """The proposal was decided on, has expired, or does not hold any more."""

    code = "already_decided"


class RuleUnavailable(Refused):
    """The rule behind the proposal cannot be asked here, so nobody knows whether it holds."""

    code = "rule_unavailable"


class ConsumerExists(Refused):
    """A consumer of telemetry has this name already."""

    code = "consumer_exists"


class PositionAhead(Refused):
    """A position that was not given, or is not any more: the database went back in time."""

    code = "position_ahead"


class NotEntitled(Refused):
    """The change reaches namespaces in which who asks has no say."""

    code = "not_entitled"


class IdempotencyKeyReused(OrbitError):
    """The idempotency key was used before with another request body."""

    code = "idempotency_key_reused"


class RequestInvalid(OrbitError):
    """A request's value is not acceptable; says which and what is."""

    code = "request_invalid"


class NotFound(OrbitError):
    """What was asked for does not exist (or is not visible)."""

    code = "not_found"
