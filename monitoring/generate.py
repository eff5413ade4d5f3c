"""Writes what is made from code: `python -m monitoring.generate`. A test fails where what is committed is anything else."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from monitoring import alerting, dashboards, pages
from monitoring.rules import RULES

ROOT = Path(__file__).parent.parent
BY_HAND = {"OnsetAnomaly": "A stream behaves as it hardly ever does.", "OnsetSilence": "A stream has fallen silent."}
"""Runbooks of the alerts that the service itself sends."""


def files(runbooks: str = alerting.RUNBOOKS) -> Mapping[str, str]:
    """Path below the repository's root → content; `runbooks` is where an alert's reader finds the pages."""
    made = {
        "docs/metrics.md": pages.metrics(),
        "docs/settings.md": pages.settings(),
        "monitoring/prometheus/rules.yml": alerting.prometheus_rules(runbooks),
        "monitoring/prometheus/rules.test.yml": alerting.prometheus_tests(),
        "monitoring/grafana/provisioning/alerting/onset.yml": alerting.grafana_rules(runbooks),
        "docs/runbooks/README.md": alerting.index(BY_HAND),
    }
    made |= {f"monitoring/grafana/dashboards/onset-{name}.json": content for name, content in dashboards.all_dashboards().items()}
    return made | {f"docs/runbooks/{rule.name}.md": alerting.runbook(rule) for rule in RULES}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m monitoring.generate", description=__doc__)
    parser.add_argument("--runbooks", default=alerting.RUNBOOKS, help="where the pages of docs/runbooks are read")
    for name, content in files(parser.parse_args().runbooks.rstrip("/")).items():
        path = ROOT / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        print(name)


if __name__ == "__main__":
    main()
