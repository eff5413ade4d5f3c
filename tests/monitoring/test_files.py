"""What monitoring/ generates, and what is written by hand beside it, without a server."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from grafana_foundation_sdk.models import dashboard as models

from monitoring import dashboards
from monitoring.generate import BY_HAND, ROOT, files
from monitoring.queries import queries, substituted, variables
from monitoring.rules import RULES, Rule
from service.metrics import CATALOGUE
from service.series import SERIES
from service.settings import Settings
from tests.needs import program

BOARDS = {name: json.loads(content) for name, content in dashboards.all_dashboards().items()}
VALUES = variables(3600, 15, 'up{instance="a:9100",job="node"}', "value")
PROMETHEUS, ALERTMANAGER, GRAFANA = (ROOT / "monitoring" / name for name in ("prometheus", "alertmanager", "grafana"))
OTHERS = {"up", "ALERTS", "process_cpu_seconds_total", "process_resident_memory_bytes"}


def known(name: str) -> bool:
    names = {metric.name for metric in (*CATALOGUE, *SERIES)} | OTHERS
    return name in names or re.sub("_(bucket|sum|count)$", "", name) in {metric.name for metric in CATALOGUE if metric.kind == "histogram"}


def selectors(node: Any) -> set[str]:
    """Names of the metrics that a parsed query asks for."""
    if isinstance(node, promql_parser.VectorSelector):
        return {str(node.name)}
    children = [getattr(node, name, None) for name in ("expr", "lhs", "rhs", "vector_selector", "param")]
    children += list(getattr(node, "args", None) or [])
    return set().union(*(selectors(child) for child in children if child is not None and not isinstance(child, str)))


def panels(board: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for panel in board["panels"] if panel["type"] != "row"]


def run(name: str, package: str, *arguments: str | Path) -> str:
    done = subprocess.run([program(name, package), *map(str, arguments)], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_no_generated_file_is_left_over() -> None:
    folders = ("docs/runbooks", "monitoring/grafana/dashboards")
    there = {str(path.relative_to(ROOT)) for folder in folders for path in (ROOT / folder).iterdir()}
    assert there == {name for name in files() if name.startswith(folders)} | {f"docs/runbooks/{name}.md" for name in BY_HAND}


def test_dashboards_have_addresses_of_their_own() -> None:
    assert len({board["uid"] for board in BOARDS.values()}) == len({board["title"] for board in BOARDS.values()}) == 5


@pytest.mark.parametrize("name", BOARDS)
def test_panels_have_unique_ids_and_none_lies_on_another(name: str) -> None:
    every = BOARDS[name]["panels"]
    assert len({panel["id"] for panel in every}) == len(every)
    for one, other in itertools.combinations([panel["gridPos"] for panel in every], 2):
        apart = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        assert apart or one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in every)


@pytest.mark.parametrize("name", BOARDS)
def test_every_panel_says_what_it_shows_in_which_unit_and_when_it_is_bad(name: str) -> None:
    for panel in panels(BOARDS[name]):
        assert panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        steps = panel["fieldConfig"]["defaults"]["thresholds"]["steps"]
        assert steps[0]["value"] is None, panel["title"]
        assert [step["value"] for step in steps[1:]] == sorted(step["value"] for step in steps[1:])
        assert panel["targets"], panel["title"]
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])


@pytest.mark.parametrize("name", BOARDS)
def test_the_data_source_is_a_variable_everywhere(name: str) -> None:
    board = BOARDS[name]
    variables_ = board["templating"]["list"]
    assert (variables_[0]["name"], variables_[0]["type"]) == ("datasource", "datasource")
    uses = [panel["datasource"] for panel in panels(board)] + [
        variable["datasource"] for variable in variables_[1:] if variable["type"] == "query"
    ]
    uses += [target["datasource"] for panel in panels(board) for target in panel["targets"]]
    assert all(use == {"type": "prometheus", "uid": "${datasource}"} for use in uses)


@pytest.mark.parametrize("name", BOARDS)
def test_a_dashboard_reads_back_as_the_same_one(name: str) -> None:
    board = json.loads(json.dumps(BOARDS[name]))
    again = json.loads(json.dumps(models.Dashboard.from_json(board), default=lambda part: part.to_json()))
    for annotation in board.get("annotations", {}).get("list", []):  # which the SDK's model lacks
        for extra in ("useValueForTime", "titleFormat", "textFormat"):
            annotation.pop(extra)
    assert again == board


def test_every_query_parses_and_asks_only_for_metrics_that_exist() -> None:
    for asked in queries():
        names = selectors(promql_parser.parse(substituted(asked.expr, VALUES)))
        assert names or "vector(" in asked.expr, asked
        assert all(known(name) for name in names), (asked, names)


def test_no_query_asks_what_increased_within_less_than_two_scrapes() -> None:
    """Grafana's $__interval is one scrape in the time shown by default: its panels had no data."""
    assert [asked for asked in queries() if "$__interval" in asked.expr] == []


def test_a_panel_that_may_find_nothing_says_what_has_to_be_set_for_it_to_find_something() -> None:
    said = {panel["title"]: panel["fieldConfig"]["defaults"].get("noValue", "") for board in BOARDS.values() for panel in panels(board)}
    assert "ONSET_STREAM_METRICS" in said["Top streams by score"]
    assert "ONSET_SOURCES" in said["Lag"]
    assert said["Store memory"] == "The store has no maxmemory."
    assert "no data" not in " ".join(panel["description"] for board in BOARDS.values() for panel in panels(board))
    assert said["Ready"] == ""
    for name in ("stream", "logs"):
        assert [panel["title"] for panel in panels(BOARDS[name]) if not said[panel["title"]]] == []
    settings = {f"ONSET_{field.upper()}" for field in Settings.model_fields}
    assert {word for words in said.values() for word in re.findall("ONSET_[A-Z_]+[A-Z]", words)} <= settings


def test_rules_of_another_installation_are_not_counted_among_those_that_fire() -> None:
    [expr] = [asked.expr for asked in queries() if "ALERTS{" in asked.expr]
    assert 'job=~"$job|"' in expr  # "" = a rule that tells of a job that is not there at all


def test_what_comes_a_second_says_so() -> None:
    rate = re.compile(r"sum by \([^)]*\) \(rate\(onset_[a-z_]+_total\{[^}]*\}\[\$__rate_interval\]\)\)")
    shown = [panel for board in BOARDS.values() for panel in panels(board) if all(rate.fullmatch(one["expr"]) for one in panel["targets"])]
    assert len(shown) == 8
    assert [panel["title"] for panel in shown if panel["fieldConfig"]["defaults"]["unit"] not in ("cps", "reqps")] == []


def test_streams_of_several_installations_are_added_up() -> None:
    largest = re.compile(r"max( by \([^)]*\))? ?\(onset_streams")
    shared = {asked.where: largest.findall(asked.expr) for asked in queries() if not asked.where.startswith("rule")}
    assert sum(map(len, shared.values())) == 4
    assert {where: by for where, found in shared.items() for by in found if "job" not in by} == {}


def test_dashboards_lead_to_the_page_with_names_as_an_address_has_them() -> None:
    for name, field in (("overview", "__data.fields"), ("stream", "__field.labels")):
        text = json.dumps(BOARDS[name])
        assert f"${{page:raw}}?stream=${{{field}.stream:percentencode}}&model=${{{field}.model:percentencode}}" in text
    assert "&${job:queryparam}&" in json.dumps(BOARDS["overview"])  # of several installations ${job} is {a,b}, which is none
    for board in BOARDS.values():
        assert "${page:raw}" in [link.get("url") for link in board["links"]]
        [page] = [variable for variable in board["templating"]["list"] if variable["name"] == "page"]
        assert (page["type"], page["query"]) == ("textbox", dashboards.PAGE)


def test_every_setting_is_explained_with_its_default() -> None:
    rows = re.findall(r"^\| `(ONSET_[A-Z_]+)` \| (.*?) \| (.*) \|$", files()["docs/settings.md"], re.MULTILINE)
    assert [name for name, _, _ in rows] == [f"ONSET_{name.upper()}" for name in Settings.model_fields]
    assert not [name for name, _, meaning in rows if re.sub(r"\(.*\)", "", meaning).strip() == ""]
    defaults = {name: default.strip("`") for name, default, _ in rows}
    assert defaults["ONSET_COPIES_BYTES"] == str(Settings().copies_bytes)
    assert (defaults["ONSET_SILENCE"], defaults["ONSET_MODEL"], defaults["ONSET_REDIS_URL"]) == ("true", "shipped", "")


def test_prometheus_takes_the_rules_and_the_configuration() -> None:
    assert f"{len(RULES)} rules found" in run("promtool", "prometheus", "check", "rules", PROMETHEUS / "rules.yml")
    run("promtool", "prometheus", "check", "config", PROMETHEUS / "prometheus.yml")


def test_every_rule_fires_where_it_must_and_is_quiet_where_it_must() -> None:
    assert "SUCCESS" in run("promtool", "prometheus", "test", "rules", PROMETHEUS / "rules.test.yml")


def test_the_rule_of_docs_log_volume_counts_each_line_once_whichever_replica_scores_it(tmp_path: Path) -> None:
    rules = re.findall(r"```yaml\n(groups:.*?)```", (ROOT / "docs/log-volume.md").read_text(), re.DOTALL)
    (tmp_path / "rules.yml").write_text("".join(rules))
    series = 'stream_events{model="app",stream="%s",instance="%s"}'
    replicas = [
        {"series": series % ("web-1", "a"), "values": "0+10x20 200x19 410+10x19"},  # b scores it from the fifth minute to the tenth
        {"series": series % ("web-1", "b"), "values": "_x21 210+10x19 400x19"},
        {"series": series % ("web-2", "a"), "values": "7x60"},
    ]
    counted = [
        {"labels": f'stream:lines:per_5m{{model="app",stream="{stream}"}}', "value": lines}
        for stream, lines in (("web-1", 200), ("web-2", 0))
    ]
    asked = [{"expr": "stream:lines:per_5m", "eval_time": at, "exp_samples": counted} for at in ("10m", "15m")]
    test = {
        "rule_files": ["rules.yml"],
        "evaluation_interval": "5m",
        "tests": [{"interval": "15s", "input_series": replicas, "promql_expr_test": asked}],
    }
    (tmp_path / "test.yml").write_text(yaml.safe_dump(test))
    assert "SUCCESS" in run("promtool", "prometheus", "test", "rules", tmp_path / "test.yml")


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_a_rule_is_complete(rule: Rule) -> None:
    assert (rule.above is None) != (rule.below is None)
    assert {case.labels is None for case in rule.cases} == {True, False}
    assert rule.summary.endswith(".")
    assert rule.description.endswith(".")
    assert (ROOT / f"docs/runbooks/{rule.name}.md").is_file()
    assert "$value" not in next(line for line in files()["docs/runbooks/README.md"].splitlines() if f"[{rule.name}]" in line)


def test_grafana_evaluates_the_same_rules() -> None:
    content = yaml.safe_load((GRAFANA / "provisioning/alerting/onset.yml").read_text())
    found = {rule["title"]: rule for group in content["groups"] for rule in group["rules"]}
    sources = yaml.safe_load((GRAFANA / "provisioning/datasources/onset.yml").read_text())["datasources"]
    assert list(found) == [rule.name for rule in RULES]
    assert len({rule["uid"] for rule in found.values()}) == len(RULES)
    for rule in RULES:
        query, condition = found[rule.name]["data"]
        assert query["model"]["expr"] == rule.value
        assert query["datasourceUid"] in {source["uid"] for source in sources}
        evaluator = condition["model"]["conditions"][0]["evaluator"]
        assert evaluator == ({"type": "gt", "params": [rule.above]} if rule.above is not None else {"type": "lt", "params": [rule.below]})
        assert (found[rule.name]["condition"], found[rule.name]["for"]) == (condition["refId"], rule.hold)
        assert "$value " not in json.dumps(found[rule.name])


def test_alertmanager_takes_its_configuration() -> None:
    assert "SUCCESS" in run("amtool", "prometheus-alertmanager", "check-config", ALERTMANAGER / "alertmanager.yml")


def test_alertmanager_takes_the_receivers_of_the_documentation(tmp_path: Path) -> None:
    [block] = re.findall("```yaml\n(receivers:.*?)```", (ROOT / "docs/monitoring.md").read_text(), re.DOTALL)
    config = yaml.safe_load((ALERTMANAGER / "alertmanager.yml").read_text())
    shipped, config["receivers"] = config["receivers"], yaml.safe_load(block)["receivers"]
    config["global"] = {"smtp_smarthost": "mail:25", "smtp_from": "onset@example.org", "slack_api_url_file": "/etc/slack"}
    (tmp_path / "alertmanager.yml").write_text(yaml.safe_dump(config))
    shutil.copy(ALERTMANAGER / "onset.tmpl", tmp_path)
    said = run("amtool", "prometheus-alertmanager", "check-config", tmp_path / "alertmanager.yml")
    assert re.search(r"\b1 templates", said), said
    assert {one["name"] for one in config["receivers"]} == {one["name"] for one in shipped}


def _message(name: str, folder: Path, alerts: list[dict[str, Any]], status: str = "firing") -> str:
    """What a receiver says of a group of alerts."""
    common = {key: value for key, value in alerts[0]["labels"].items() if all(one["labels"].get(key) == value for one in alerts)}
    grouped = {key: common[key] for key in ("alertname", "model") if key in common}
    data = {"status": status, "alerts": [one | {"status": status} for one in alerts], "groupLabels": grouped, "commonLabels": common}
    (folder / "data.json").write_text(json.dumps(data))
    text = f'--template.text={{{{ template "{name}" . }}}}'
    options = (f"--template.glob={ALERTMANAGER / 'onset.tmpl'}", text, f"--template.data={folder / 'data.json'}")
    return run("amtool", "prometheus-alertmanager", "template", "render", *options).rstrip("\n")


def test_messages_say_which_streams_and_what_is_wrong_with_them(tmp_path: Path) -> None:
    def alert(i: int, **annotations: str) -> dict[str, Any]:
        labels = {"alertname": "OnsetAnomaly", "model": "m", "severity": "critical", "stream": f"pump-{i}"}
        words = {"summary": f"pump-{i} is 3 above its expected range.", "description": "p-value 1e-9.", "link": f"https://o/?alert={i}"}
        return {"labels": labels, "annotations": words | annotations}

    assert _message("onset.title", tmp_path, [alert(0)]) == "[critical] pump-0 is 3 above its expected range."
    assert _message("onset.title", tmp_path, [alert(0)], "resolved") == "Over: [critical] pump-0 is 3 above its expected range."
    assert _message("onset.text", tmp_path, [alert(0)]) == "• pump-0 is 3 above its expected range. p-value 1e-9. https://o/?alert=0"
    many = [alert(i) for i in range(120)]
    assert _message("onset.title", tmp_path, many) == "[critical] 120 × OnsetAnomaly of m"
    lines = _message("onset.text", tmp_path, many).splitlines()
    assert lines[:10] == [f"• pump-{i} is 3 above its expected range. https://o/?alert={i}" for i in range(10)]
    assert lines[10:] == ["… 120 in all."]
    noted = alert(0, acknowledged_by="anna", summary="web-1 logs unusual lines: <!channel> & <https://evil|look>")
    assert _message("onset.text", tmp_path, [noted, alert(1)]).splitlines()[0] == (
        "• web-1 logs unusual lines: ‹!channel> & ‹https://evil|look> anna looks after it. https://o/?alert=0"
    )
    rule = {
        "labels": {"alertname": "OnsetDown"},
        "annotations": {"summary": "Down.", "description": "For long.", "runbook_url": "docs/r.md"},
    }
    assert _message("onset.title", tmp_path, [rule]) == "Down."
    assert _message("onset.text", tmp_path, [rule]) == "• Down. For long. docs/r.md"


@pytest.mark.parametrize(
    ("labels", "receiver"),
    [
        ("alertname=OnsetAnomaly model=m stream=s severity=minor", "onset-anomalies"),
        ("alertname=OnsetAnomaly model=m stream=s severity=critical", "onset-pager"),
        ("alertname=OnsetSilence model=m stream=s severity=minor", "onset-anomalies"),
        ("alertname=OnsetStreamAnomalous model=m stream=s severity=warning", "onset-anomalies"),
        ("alertname=OnsetUnavailable severity=critical", "onset-pager"),
        ("alertname=OnsetEventsLate severity=warning", "onset-tickets"),
    ],
)
def test_alerts_are_routed(labels: str, receiver: str) -> None:
    config = f"--config.file={ALERTMANAGER / 'alertmanager.yml'}"
    run("amtool", "prometheus-alertmanager", "config", "routes", "test", config, f"--verify.receivers={receiver}", *labels.split())
