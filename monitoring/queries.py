"""Asks a Prometheus every query of the dashboards and rules: `python -m monitoring.queries http://localhost:9090`.

Prints how many series each one returns, and ends with 1 where one returns none: a dashboard panel that would stay empty.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from monitoring import dashboards
from monitoring.rules import RULES

RANGE_SECONDS = 3600


@dataclass(frozen=True)
class Asked:
    """A query of a dashboard, its variables, or a rule."""

    where: str
    expr: str
    instant: bool = False


@dataclass(frozen=True)
class Found:
    """`series` it returned, and `points` in all of them."""

    asked: Asked
    series: int
    points: int


def queries() -> list[Asked]:
    """Every one there is."""
    found = [asked for content in dashboards.all_dashboards().values() for asked in of_dashboard(json.loads(content))]
    return found + [Asked(f"rule {rule.name}", rule.value, instant=True) for rule in RULES]


def of_dashboard(board: Mapping[str, Any]) -> Iterable[Asked]:
    title = board["title"]
    for variable in board["templating"]["list"]:
        if variable["type"] == "query":  # label_values(SELECTOR, LABEL)
            selector, _, label = variable["query"].removeprefix("label_values(").removesuffix(")").rpartition(", ")
            yield Asked(f"{title} / ${variable['name']}", f"count by ({label}) ({selector})", instant=True)
    for annotation in board.get("annotations", {}).get("list", []):
        yield Asked(f"{title} / annotation {annotation['name']}", annotation["expr"])
    for panel in board["panels"]:
        for target in panel.get("targets", []):
            yield Asked(f"{title} / {panel['title']}", target["expr"], target.get("instant", False))


def substituted(expr: str, variables: Mapping[str, str]) -> str:
    """The query as Grafana sends it, with these values of the dashboard's variables."""
    for name in sorted(variables, key=len, reverse=True):
        expr = expr.replace(f"${{{name}:raw}}", variables[name]).replace(f"${name}", variables[name])
    return expr


def variables(seconds: float, scrape_seconds: float, stream: str, feature: str) -> dict[str, str]:
    """Values of all variables; $__rate_interval is four scrapes, as Grafana makes it."""
    span, rate = f"{max(1, round(seconds))}s", f"{max(2, round(4 * scrape_seconds))}s"
    return {"job": ".+", "model": ".+", "stream": stream, "feature": feature, "__range": span, "__rate_interval": rate}


def ask(prometheus: str, asked: Iterable[Asked], values: Mapping[str, str], seconds: float) -> list[Found]:
    """What each query returns now, or over the last `seconds`. Raises httpx.HTTPStatusError where Prometheus refuses one."""
    now = time.time()
    found = []
    with httpx.Client(base_url=prometheus, timeout=30) as client:
        for one in asked:
            query = {"query": substituted(one.expr, values)}
            if one.instant:
                reply = client.post("/api/v1/query", data=query)
            else:
                step = max(1.0, seconds / 200)
                reply = client.post("/api/v1/query_range", data=query | {"start": str(now - seconds), "end": str(now), "step": str(step)})
            result = reply.raise_for_status().json()["data"]["result"]
            found.append(Found(one, len(result), sum(len(series.get("values", [None])) for series in result)))
    return found


def table(found: Iterable[Found]) -> str:
    """One line a query: series, points, where it is from."""
    return "\n".join(["series points  query", *(f"{one.series:6} {one.points:6}  {one.asked.where}: {one.asked.expr}" for one in found)])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m monitoring.queries", description=__doc__)
    parser.add_argument("prometheus", help="address of a Prometheus that scrapes the service")
    parser.add_argument("--stream", required=True, help="a stream that is shown one by one (ONSET_STREAM_METRICS)")
    parser.add_argument("--feature", default="value", help="one of its features")
    parser.add_argument("--scrape-seconds", type=float, default=15, help="scrape interval (default 15)")
    options = parser.parse_args()
    values = variables(RANGE_SECONDS, options.scrape_seconds, options.stream, options.feature)
    try:
        found = ask(options.prometheus, queries(), values, RANGE_SECONDS)
    except httpx.HTTPStatusError as error:
        print(f"{options.prometheus} refuses a query: {error.response.text[:500]}", file=sys.stderr)
        return 2
    except httpx.HTTPError as error:
        print(f"{options.prometheus} does not answer: {error}.", file=sys.stderr)
        return 2
    print(table(found))
    empty = [one for one in found if one.series == 0]
    print(f"{len(found)} queries, {len(empty)} of them without data.")
    return 1 if empty else 0


if __name__ == "__main__":
    sys.exit(main())
