"""Instruction synthesis: what a profile and a run profile together tell one cycle's steps.

Stateless and pure: the same revision gives the same instruction, so it is never stored. Orbit
hands it on; only the user's code gives meaning to it.
"""

from __future__ import annotations

from typing import Any

from orbit.profiles.model import Profile, RunProfile


def synthesize(profile: Profile, run_profile: RunProfile) -> dict[str, Any]:
    """The instruction: JSON values under the names that the configuration files use."""
    return {
        "profile_id": profile.profile_id,
        "run_profile_id": run_profile.run_profile_id,
        "namespace": run_profile.namespace,
        "label": profile.label,
        "style_vector": dict(profile.style_vector),
        "asset_bindings": dict(profile.asset_bindings),
        "execution_rules": dict(profile.execution_rules),
        "distribution_map": dict(profile.distribution_map),
        "asset_bundle": dict(run_profile.asset_bundle),
        "distribution_targets": list(run_profile.distribution_targets),
        "value_tags": merged_tags(profile, run_profile),
    }


def merged_tags(profile: Profile, run_profile: RunProfile) -> dict[str, Any]:
    """The value tags of an execution: the run profile's over the profile's."""
    return {**profile.value_tags, **run_profile.value_tags}
