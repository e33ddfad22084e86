"""``python -m bench.faults [--repeat N] [--only FAULT ...] [--json] [--write]``: what real faults cost.

Each fault of ``tests.fault_cases`` and ``tests.fault_alone`` is done N times on a cluster of three real Ray
nodes (a head and two with two GPUs each, draft engine, windows of half a second); every run is checked as
the tests check it.  ``--write`` puts the table into docs/faults.md.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from statistics import median

from tests.fault_alone import ALONE, missing_for
from tests.fault_cases import CASES, Measured, cluster_of
from tests.fault_cluster import RAY_ENV

DOCS = Path(__file__).resolve().parent.parent / "docs" / "faults.md"
BEGIN, END = "<!-- python -m bench.faults --write -->", "<!-- end -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=[*CASES, *ALONE], metavar="FAULT")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--write", action="store_true", help="the table goes into docs/faults.md")
    options = parser.parse_args()
    os.environ.update(RAY_ENV)
    wanted = options.only or [*CASES, *ALONE]
    runs: dict[str, list[Measured]] = {}
    skipped: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="bench-faults-") as folder:
        shared = [name for name in CASES if name in wanted]
        for number in range(options.repeat):
            if shared:
                with cluster_of(Path(folder) / f"shared-{number}") as cluster:
                    for name in shared:
                        runs.setdefault(name, []).append(CASES[name](cluster))
            for name in [name for name in ALONE if name in wanted]:
                if reason := missing_for(name):
                    skipped[name] = reason
                    continue
                place = Path(folder) / f"alone-{len(runs)}-{number}"
                for measured in ALONE[name](place):
                    runs.setdefault(measured.fault, []).append(measured)
    if options.json:
        print(
            json.dumps({"runs": [asdict(run) for each in runs.values() for run in each], "skipped": skipped})
        )
    else:
        print(table(runs))
        for name, reason in skipped.items():
            print(f"not done: {name}: {reason}")
    if options.write:
        _write(table(runs))


def table(runs: dict[str, list[Measured]]) -> str:
    """One line for each fault: medians, and the worst in brackets."""
    lines = [
        "| fault | runs | seconds until the work went on | until the job's end | windows | rendered twice |",
        "|---|---|---|---|---|---|",
    ]
    for each in runs.values():
        on = [run.recovered for run in each if run.recovered is not None]
        over, twice = [run.ended for run in each], [run.twice for run in each]
        cells = (
            *(each[0].fault, len(each), f"{median(on):.1f} ({max(on):.1f})"),
            *(f"{median(over):.1f} ({max(over):.1f})", each[0].windows),
            f"{median(twice):g} ({max(twice)})",
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def _write(text: str) -> None:
    before, _, rest = DOCS.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    DOCS.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


if __name__ == "__main__":
    main()
