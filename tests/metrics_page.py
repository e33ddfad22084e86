"""Ray's page of metrics, read as Prometheus reads it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import requests
from prometheus_client.parser import text_string_to_metric_families

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]
OWN = {"state", "outcome", "verdict", "gpu", "node", "profile", "reason", "route", "method", "status", "le"}


def scrape(url: str) -> Samples:
    """Our samples by name and own labels, summed over processes, as Prometheus reads them."""
    found: Samples = {}
    for family in text_string_to_metric_families(requests.get(url, timeout=120).text):
        for sample in family.samples:
            if sample.name.startswith("ray_infinitetalk_"):
                labels = {(k, v) for k, v in sample.labels.items() if k in OWN}
                key = sample.name.removeprefix("ray_infinitetalk_"), frozenset(labels)
                found[key] = found.get(key, 0.0) + sample.value
    return found


def until(url: str, holds: Callable[[Samples], Any], seconds: float = 120) -> Samples:
    """The first page on which something holds."""
    deadline = time.monotonic() + seconds
    while True:
        found = scrape(url)
        if holds(found):
            return found
        assert time.monotonic() < deadline, found
        time.sleep(0.2)


def key(name: str, **labels: str) -> tuple[str, frozenset[tuple[str, str]]]:
    return name, frozenset(labels.items())
