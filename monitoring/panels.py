"""How our panels look: one function for each kind, over Grafana's foundation SDK. Each panel has a description, a unit and thresholds."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from grafana_foundation_sdk.builders import barchart, bargauge, common, dashboard, heatmap, prometheus, stat, table, timeseries
from grafana_foundation_sdk.models import common as common_models
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models import heatmap as heatmap_models
from grafana_foundation_sdk.models import prometheus as prometheus_models

DATASOURCE = models.DataSourceRef(type_val="prometheus", uid="${datasource}")
WIDTH = 24
GOOD, WARN, BAD, WORST, NEUTRAL = "green", "yellow", "orange", "red", "blue"
SCORE = ((None, GOOD), (1.0, WARN), (1.5, BAD), (2.0, WORST))
"""Of anomaly scores: minor, major and critical begin there."""
PLAIN = ((None, NEUTRAL),)
"""A number that is neither good nor bad."""
NONE_IS_GOOD = ((None, GOOD), (1e-9, BAD))
EMPTY = {
    r"\b(anomaly_score|anomaly_grade|anomaly_event_timestamp_seconds|anomaly_onset_timestamp_seconds|y|yhat|contribution)\{": (
        "Nothing here: set ONSET_STREAM_METRICS. A stream that has said nothing for 5 minutes is not shown, either."
    ),
    r"onset_source_": "No queue is read: ONSET_SOURCES is not set.",
    r"onset_alert_(deliveries|lag)": "Nobody is told: set ONSET_ALERTS_ALERTMANAGERS or another sink.",
    r"onset_write_back_": "No scores are written back: ONSET_REMOTE_WRITE_URL is not set.",
    r"onset_canary_": "No canary runs: ONSET_CANARY_SECONDS is 0, or all models are of logs.",
    r"onset_lines_total": "No model of logs is loaded.",
    r"onset_store_memory_ratio": "The store has no maxmemory.",
    r"histogram_quantile": "Nothing was scored in this time.",
}
"""What a panel says where it finds nothing, in place of "No data", by what its queries ask for."""

Steps = Sequence[tuple[float | None, str]]


@dataclass(frozen=True)
class Query:
    """A PromQL query; `instant` = only the last value, `table` = labels become columns."""

    expr: str
    legend: str = ""
    instant: bool = False
    table: bool = False


def line(
    title: str, description: str, queries: Sequence[Query], unit: str, steps: Steps = PLAIN, *, width: int = 12, height: int = 8
) -> Any:
    """Lines over time; thresholds other than PLAIN are drawn."""
    panel = _described(timeseries.Panel(), title, description, queries, unit, steps, width, height)
    legend = common.VizLegendOptions().display_mode(common_models.LegendDisplayMode.LIST)
    panel = panel.legend(legend.placement(common_models.LegendPlacement.BOTTOM).show_legend(True))
    tooltip = common.VizTooltipOptions().mode(common_models.TooltipDisplayMode.MULTI).sort(common_models.SortOrder.DESCENDING)
    panel = panel.tooltip(tooltip).line_width(1).fill_opacity(8).show_points(common_models.VisibilityMode.NEVER)
    if steps is not PLAIN:
        panel = panel.thresholds_style(common.GraphThresholdsStyleConfig().mode(common_models.GraphThresholdsStyleMode.DASHED))
    else:
        panel = panel.color_scheme(dashboard.FieldColor().mode(models.FieldColorModeId.PALETTE_CLASSIC))
    return panel


def bars(title: str, description: str, queries: Sequence[Query], *, width: int = 12) -> Any:
    """Stacked bars over time, of counts; a bar is a minute at least.

    Over a time shorter than two scrapes, as Grafana's $__interval is by default, nothing increases.
    """
    panel = line(title, description, queries, "short", width=width)
    stacking = common.StackingConfig().mode(common_models.StackingMode.NORMAL)
    return panel.draw_style(common_models.GraphDrawStyle.BARS).fill_opacity(60).stacking(stacking).interval("1m")


def number(
    title: str, description: str, query: Query, unit: str, steps: Steps = PLAIN, *, width: int = 3, height: int = 4, names: bool = False
) -> Any:
    """The last value, with its history behind it; `names` = one each series."""
    panel = _described(stat.Panel(), title, description, [query], unit, steps, width, height)
    reduce = common.ReduceDataOptions().calcs(["lastNotNull"])
    mode = common_models.BigValueTextMode.VALUE_AND_NAME if names else common_models.BigValueTextMode.VALUE
    return panel.reduce_options(reduce).color_mode(common_models.BigValueColorMode.VALUE).text_mode(mode)


def rows(title: str, description: str, query: Query, unit: str, steps: Steps, *, columns: dict[str, str]) -> Any:
    """A table of the labels in `columns` (label → title; "Value" is the number)."""
    panel = _described(table.Panel(), title, description, [query], unit, steps, 12, 9)
    order = {name: i for i, name in enumerate(columns)}
    organize = models.DataTransformerConfig(
        id_val="organize", options={"indexByName": order, "renameByName": columns, "excludeByName": {"Time": True}}
    )
    kept = models.DataTransformerConfig(id_val="filterFieldsByName", options={"include": {"names": list(columns)}})
    return panel.transformations([kept, organize])


def heat(title: str, description: str, query: Query, unit: str) -> Any:
    """A heat map of a histogram's buckets over time."""
    panel = _described(heatmap.Panel(), title, description, [query], unit, PLAIN, 24, 8, heatmap=True)
    color = (
        heatmap.HeatmapColorOptions()
        .mode(heatmap_models.HeatmapColorMode.SCHEME)
        .scheme("Turbo")
        .scale(heatmap_models.HeatmapColorScale.EXPONENTIAL)
    )
    return panel.calculate(False).color(color.exponent(0.35).steps(64)).cell_gap(1)


def gauges(title: str, description: str, query: Query, unit: str, steps: Steps) -> Any:
    """Horizontal bars, one each series."""
    panel = _described(bargauge.Panel(), title, description, [query], unit, steps, 12, 9)
    reduce = common.ReduceDataOptions().calcs(["lastNotNull"])
    panel = panel.reduce_options(reduce).orientation(common_models.VizOrientation.HORIZONTAL)
    return panel.display_mode(common_models.BarGaugeDisplayMode.GRADIENT).min(0).max(1)


def compare(title: str, description: str, queries: Sequence[Query], unit: str, *, by: str, names: dict[str, str]) -> Any:
    """Bars of several instant queries side by side for each value of the label `by`; `names` of the queries' values."""
    panel = _described(barchart.Panel(), title, description, queries, unit, PLAIN, 24, 10)
    join = models.DataTransformerConfig(id_val="joinByField", options={"byField": by, "mode": "outer"})
    kept = models.DataTransformerConfig(id_val="filterFieldsByName", options={"include": {"names": [by, *names]}})
    rename = models.DataTransformerConfig(id_val="organize", options={"renameByName": names})
    panel = panel.transformations([join, kept, rename]).x_field(by).min(0)
    return panel.color_scheme(dashboard.FieldColor().mode(models.FieldColorModeId.PALETTE_CLASSIC))


def banded(panel: Any) -> Any:
    """Fill between the lines `lower` and `upper`, and draw `value` over it."""
    faint = models.DynamicConfigValue(id_val="color", value={"mode": "fixed", "fixedColor": "super-light-blue"})
    thin = models.DynamicConfigValue(id_val="custom.lineWidth", value=0)
    bare = models.DynamicConfigValue(id_val="custom.fillOpacity", value=0)
    fill = [
        models.DynamicConfigValue(id_val="custom.fillBelowTo", value="lower"),
        models.DynamicConfigValue(id_val="custom.fillOpacity", value=25),
    ]
    panel = panel.override_by_name("upper", [faint, thin, *fill]).override_by_name("lower", [faint, thin, bare])
    dashed = models.DynamicConfigValue(id_val="custom.lineStyle", value={"fill": "dash", "dash": [8, 6]})
    panel = panel.override_by_name("expected", [_color("blue"), dashed, bare])
    return panel.override_by_name("value", [_color("text"), models.DynamicConfigValue(id_val="custom.lineWidth", value=2), bare])


def linked(panel: Any, field: str, links: dict[str, str]) -> Any:
    """Make the cells of a table's column links: title → address."""
    value = [{"title": title, "url": url} for title, url in links.items()]
    return panel.override_by_name(field, [models.DynamicConfigValue(id_val="links", value=value)])


def flow(sections: Sequence[tuple[str, Sequence[Any]]]) -> Iterator[Any]:
    """Rows with their panels, in order, from left to right, with ids and places."""
    y, number_ = 0, 0
    for title, panels in sections:
        number_ += 1
        yield dashboard.Row(title).id(number_).grid_pos(models.GridPos(h=1, w=WIDTH, x=0, y=y))
        y, x, tallest = y + 1, 0, 0
        for panel in panels:
            number_ += 1
            size = panel.build().grid_pos
            if x + size.w > WIDTH:
                y, x, tallest = y + tallest, 0, 0
            yield panel.id(number_).grid_pos(models.GridPos(h=size.h, w=size.w, x=x, y=y))
            x, tallest = x + size.w, max(tallest, size.h)
        y += tallest


def _described(
    panel: Any,
    title: str,
    description: str,
    queries: Sequence[Query],
    unit: str,
    steps: Steps,
    width: int,
    height: int,
    *,
    heatmap: bool = False,
) -> Any:
    panel = (
        panel.title(title).description(description).datasource(DATASOURCE).unit(unit).grid_pos(models.GridPos(h=height, w=width, x=0, y=0))
    )
    levels = [models.Threshold(value=value, color=color) for value, color in steps]
    panel = panel.thresholds(dashboard.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(levels))
    if words := [said for asked, said in EMPTY.items() if any(re.search(asked, query.expr) for query in queries)]:
        panel = panel.no_value(words[0])
    if steps is not PLAIN:
        panel = panel.color_scheme(dashboard.FieldColor().mode(models.FieldColorModeId.THRESHOLDS))
    for i, query in enumerate(queries):
        target = (
            prometheus.Dataquery().ref_id(chr(ord("A") + i)).expr(query.expr).legend_format(query.legend or "__auto").datasource(DATASOURCE)
        )
        target = target.instant() if query.instant else target.range()
        form = prometheus_models.PromQueryFormat
        panel = panel.with_target(target.format(form.HEATMAP if heatmap else form.TABLE if query.table else form.TIME_SERIES))
    return panel


def _color(name: str) -> models.DynamicConfigValue:
    return models.DynamicConfigValue(id_val="color", value={"mode": "fixed", "fixedColor": name})
