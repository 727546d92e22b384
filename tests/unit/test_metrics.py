"""What a node counts is told as Prometheus expects it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram

from orbit.metrics import REGISTRY, Seconds

BUCKETS = (0.005, 0.25, 1, 60)


@given(st.lists(st.floats(0, 100) | st.sampled_from(BUCKETS), max_size=30))
def test_many_observations_at_once_tell_what_the_library_would(values: list[float]) -> None:
    """The same buckets, with the same counts, bounds included, and the same sum."""
    theirs = CollectorRegistry()
    histogram = Histogram("taken", "Taken.", buckets=BUCKETS, registry=theirs)
    ours = Seconds("taken", "Taken.", buckets=BUCKETS)
    REGISTRY.unregister(ours)
    for value in values:
        histogram.observe(value)
    ours.observe(values)
    (family,), (expected,) = ours.collect(), histogram.collect()
    found = {(sample.name, sample.labels.get("le")): sample.value for sample in family.samples}
    for sample in expected.samples:
        if not sample.name.endswith("_created"):
            assert found.pop((sample.name, sample.labels.get("le"))) == sample.value
    assert found == {}
