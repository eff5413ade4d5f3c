"""rules.py → Prometheus rule groups and their tests, Grafana's own rules, and the runbooks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

import yaml
from grafana_foundation_sdk.builders import alerting, expr, prometheus
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.alerting import RelativeTimeRange

from monitoring.rules import RULES, Case, Rule

DATASOURCE_UID = "onset-prometheus"
"""Of the data source that provisioning makes."""
RUNBOOKS = "docs/runbooks"
HEAD = "# Made by `python -m monitoring.generate` from monitoring/rules.py: change that.\n"
_SECONDS = {"m": 60, "h": 3600, "d": 86_400}


def prometheus_rules(runbooks: str) -> str:
    """Rule groups for Prometheus; `runbooks` is where the pages are read."""
    groups = [{"name": name, "rules": [_alert(rule, runbooks) for rule in rules]} for name, rules in _groups().items()]
    return HEAD + dumped({"groups": groups})


def prometheus_tests() -> str:
    """For `promtool test rules`: each rule in cases that fire and cases that do not."""
    cases = [(rule, case) for rule in RULES for case in rule.cases]
    return HEAD + dumped({"rule_files": ["rules.yml"], "evaluation_interval": "1m", "tests": [_test(rule, case) for rule, case in cases]})


def grafana_rules(runbooks: str) -> str:
    """The same rules for those who let Grafana evaluate them: a file of its alerting provisioning."""
    groups = [
        {"orgId": 1, "name": name, "folder": "Onset", "interval": "1m", "rules": [_managed(rule, runbooks) for rule in rules]}
        for name, rules in _groups().items()
    ]
    return HEAD + dumped({"apiVersion": 1, "groups": groups})


def runbook(rule: Rule) -> str:
    """What a person reads who was woken up by it."""
    return f"""# {rule.name}

<!-- Made by `python -m monitoring.generate` from monitoring/rules.py: change that. -->

`{rule.severity}`, group `{rule.group}`. Fires when this holds for {rule.hold}:

```promql
{rule.expr}
```

## What it means

{rule.means}

## What to look at

{_list(rule.look)}

## What to do

{_list(rule.act)}
"""


def index(by_hand: Mapping[str, str]) -> str:
    """The runbooks' table of contents; `by_hand` = those of alerts that no rule makes."""
    rows = [f"| [{rule.name}]({rule.name}.md) | {rule.severity} | {_plain(rule.summary)} |" for rule in RULES]
    rows += [f"| [{name}]({name}.md) | by the anomaly | {summary} |" for name, summary in by_hand.items()]
    head = [
        "# Runbooks",
        "",
        "One page for each alert. The rules are in `monitoring/rules.py`.",
        "",
        "| alert | severity | |",
        "|---|---|---|",
    ]
    return "\n".join([*head, *rows, ""])


def dumped(content: object) -> str:
    """As YAML that a person can read."""
    return yaml.safe_dump(content, sort_keys=False, width=140, allow_unicode=True)


def _groups() -> dict[str, list[Rule]]:
    groups: dict[str, list[Rule]] = {}
    for rule in RULES:
        groups.setdefault(rule.group, []).append(rule)
    return groups


def _alert(rule: Rule, runbooks: str) -> dict[str, Any]:
    return {
        "alert": rule.name,
        "expr": rule.expr,
        "for": rule.hold,
        "labels": {"severity": rule.severity},
        "annotations": _annotations(rule, runbooks),
    }


def _annotations(rule: Rule, runbooks: str) -> dict[str, str]:
    return {"summary": rule.summary, "description": rule.description, "runbook_url": f"{runbooks}/{rule.name}.md"}


def _test(rule: Rule, case: Case) -> dict[str, Any]:
    minutes = min(_minutes(values) for values in case.series.values())
    firing = []
    if case.labels is not None:
        labels = {"alertname": rule.name, "alertstate": "firing", "severity": rule.severity, **case.labels}
        matched = ",".join(f'{name}="{value}"' for name, value in labels.items())
        firing = [{"labels": f"ALERTS{{{matched}}}", "value": 1}]
    return {
        "name": f"{rule.name} {'fires' if case.labels is not None else 'is quiet'}",
        "interval": "1m",
        "input_series": [{"series": series, "values": values} for series, values in case.series.items()],
        "promql_expr_test": [
            {"expr": f'ALERTS{{alertname="{rule.name}",alertstate="firing"}}', "eval_time": f"{minutes}m", "exp_samples": firing}
        ],
    }


def _minutes(values: str) -> int:
    """When the series' last value is: of "0x10 1x20" at 31 minutes."""
    parts = values.split()
    return sum(int(part.rpartition("x")[2]) if "x" in part else 0 for part in parts) + len(parts) - 1


def _managed(rule: Rule, runbooks: str) -> dict[str, Any]:
    limit = rule.above if rule.above is not None else rule.below
    compare = expr.ExprTypeThresholdConditionsEvaluator().params([cast("float", limit)]).type("gt" if rule.above is not None else "lt")
    value = alerting.Query("A").datasource_uid(DATASOURCE_UID)
    value = value.relative_time_range(RelativeTimeRange(from_val=_seconds(rule.range), to=0))
    value = value.model(prometheus.Dataquery().ref_id("A").expr(rule.value).instant())
    condition = alerting.Query("C").datasource_uid("__expr__").relative_time_range(RelativeTimeRange(from_val=_seconds(rule.range), to=0))
    condition = condition.model(
        expr.TypeThreshold().ref_id("C").expression("A").conditions([expr.ExprTypeThresholdConditions().evaluator(compare)])
    )
    built = alerting.Rule(rule.name).uid(_uid(rule.name)).condition("C").with_query(value).with_query(condition)
    # No data is no news but where it means that nobody serves; that rule answers 0 then.
    built = built.for_val(rule.hold).no_data_state("OK").exec_err_state("Error").labels({"severity": rule.severity})
    annotations = {name: _grafana(text) for name, text in _annotations(rule, runbooks).items()}
    content = json.loads(JSONEncoder().encode(built.annotations(annotations).build()))
    kept = ("uid", "title", "condition", "data", "noDataState", "execErrState", "for", "annotations", "labels")
    return {name: content[name] for name in kept} | {"isPaused": False}


def _grafana(text: str) -> str:
    """In Grafana's templates $value is a sentence about all queries; the number is $values.A.Value."""
    return text.replace("$value", "$values.A.Value")


def _uid(name: str) -> str:
    return "".join(f"-{letter.lower()}" if letter.isupper() else letter for letter in name).removeprefix("-")


def _seconds(duration: str) -> int:
    return int(duration[:-1]) * _SECONDS[duration[-1]]


def _list(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _plain(summary: str) -> str:
    return (
        summary.replace("{{ $value | humanize }}", "N")
        .replace("{{ $value | humanizePercentage }}", "N %")
        .replace("{{ $value | humanizeDuration }}", "N s")
        .replace("{{ $labels.", "`")
        .replace(" }}", "`")
    )
