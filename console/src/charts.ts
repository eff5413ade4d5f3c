/** uPlot in this page's colours: a value with what was expected, and a score with its threshold, moving together. */

import uPlot from "uplot";
import { h } from "./dom";
import { marked, number, score } from "./format";
import { colours, onTheme } from "./theme";

const AXIS_WIDTH = 62;
const DIGIT_WIDTH = 6.4; // of the font of axes, at most

export type Column = (number | null)[];

/** What marks lie over a chart: runs of anomalous points, and onsets, by position in the data. */
export interface Marks {
  anomalous: (i: number) => boolean;
  onsets: () => number[];
}

export interface Options {
  marks: Marks;
  time: boolean;
  height: number;
  label: string;
  moved: (i: number | null) => void;
  zoomed: (min: number, max: number) => void;
  reset: () => void;
  sync: uPlot.SyncPubSub;
}

/** A chart in an element of its own, made again when the colours change. */
export class Chart {
  readonly element: HTMLElement;
  private plot: uPlot | null = null;
  private data: uPlot.AlignedData = [[]];
  private range: [number, number] | null = null;
  private readonly unwatch: () => void;
  private readonly resized: ResizeObserver;

  constructor(
    private readonly options: Options,
    private readonly series: () => { series: uPlot.Series[]; bands?: uPlot.Band[]; y: uPlot.Range.Function; threshold: boolean; digits: (value: number, step: number) => string },
  ) {
    this.element = h("div", { class: "chart", role: "img", "aria-label": options.label });
    this.unwatch = onTheme(() => this.make());
    this.resized = new ResizeObserver(() => this.fit());
    this.resized.observe(this.element);
  }

  leave(): void {
    this.unwatch();
    this.resized.disconnect();
    this.plot?.destroy();
    this.plot = null;
  }

  describe(words: string): void {
    this.element.setAttribute("aria-label", `${this.options.label}. ${words}`);
  }

  show(data: uPlot.AlignedData, min: number, max: number): void {
    this.data = data;
    this.range = [min, max];
    this.element.dataset["points"] = String(data[0].length);
    this.element.dataset["onsets"] = String(this.options.marks.onsets().length);
    if (!this.plot) this.make();
    else
      this.plot.batch(() => {
        this.plot!.setData(data, false);
        this.plot!.setScale("x", { min, max });
      });
  }

  private fit(): void {
    const width = this.element.clientWidth;
    if (this.plot && width > 0 && this.plot.width !== width) this.plot.setSize({ width, height: this.options.height });
    else if (!this.plot && this.range) this.make();
  }

  private make(): void {
    const width = this.element.clientWidth;
    if (!this.range || width === 0) return;
    this.plot?.destroy();
    const paint = colours();
    const { series, bands, y, threshold, digits } = this.series();
    const axis = { stroke: paint.quiet, font: paint.font, ticks: { show: false }, grid: { stroke: paint.line, width: 1 } };
    const { moved, zoomed, reset, sync, time } = this.options;
    const [min, max] = this.range;
    this.plot = new uPlot(
      {
        width,
        height: this.options.height,
        padding: [12, 24, 0, 0], // half of a time, which may stand at the edge
        legend: { show: false },
        scales: { x: { time, min, max, auto: false }, y: { range: y } },
        axes: [
          { ...axis, grid: { show: false }, values: (_, splits) => splits.map((split) => tick(split, splits, time)), space: 80, size: 26 },
          { ...axis, values: (_, splits, __, ___, step) => splits.map((split) => digits(split, step)), size: (_, words) => Math.max(AXIS_WIDTH, 14 + DIGIT_WIDTH * Math.max(0, ...(words ?? []).map((word) => word.length))), space: 34 },
        ],
        series: [{}, ...series.map((one) => ({ ...one, gaps: breaks }))],
        ...(bands ? { bands } : {}),
        cursor: {
          y: false,
          points: { size: 6 },
          sync: { key: sync.key, setSeries: false },
          drag: { x: true, y: false, setScale: false },
          bind: {
            dblclick: () => () => {
              reset();
              return null;
            },
          },
        },
        hooks: {
          drawClear: [(plot) => this.shade(plot)],
          draw: [(plot) => this.mark(plot, threshold)],
          setCursor: [(plot) => moved(plot.cursor.left !== undefined && plot.cursor.left >= 0 ? (plot.cursor.idx ?? null) : null)],
          setSelect: [
            (plot) => {
              if (plot.select.width > 4) zoomed(plot.posToVal(plot.select.left, "x"), plot.posToVal(plot.select.left + plot.select.width, "x"));
              plot.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
            },
          ],
        },
      },
      this.data,
      this.element,
    );
  }

  private shade(plot: uPlot): void {
    const { left, top, width, height } = plot.bbox;
    const x = plot.data[0];
    plot.ctx.save();
    plot.ctx.fillStyle = colours().alarmSoft;
    const [first, last] = plot.series[0]!.idxs ?? [0, x.length - 1];
    for (let i = first; i <= last; i++) {
      if (!this.options.marks.anomalous(i)) continue;
      const begin = i;
      while (i < last && this.options.marks.anomalous(i + 1)) i++;
      const from = Math.max(left, plot.valToPos(x[begin]!, "x", true));
      const to = Math.min(left + width, plot.valToPos(x[Math.min(i + 1, x.length - 1)]!, "x", true));
      plot.ctx.fillRect(from, top, Math.max(2, to - from), height);
    }
    plot.ctx.restore();
  }

  private mark(plot: uPlot, threshold: boolean): void {
    const pen = plot.ctx;
    const ratio = uPlot.pxRatio;
    const { left, top, width, height } = plot.bbox;
    const paint = colours();
    pen.save();
    if (threshold) {
      const y = Math.round(plot.valToPos(1, "y", true)) + 0.5;
      pen.strokeStyle = paint.quiet;
      pen.lineWidth = ratio;
      pen.setLineDash([2 * ratio, 3 * ratio]);
      pen.beginPath();
      pen.moveTo(left, y);
      pen.lineTo(left + width, y);
      pen.stroke();
    }
    pen.strokeStyle = pen.fillStyle = paint.alarmEdge;
    pen.lineWidth = ratio;
    for (const i of this.options.marks.onsets()) {
      const x = plot.valToPos(plot.data[0][i]!, "x", true);
      if (x < left || x > left + width) continue;
      pen.setLineDash([4 * ratio, 3 * ratio]);
      pen.beginPath();
      pen.moveTo(x, top);
      pen.lineTo(x, top + height);
      pen.stroke();
      pen.setLineDash([]);
      pen.beginPath();
      pen.moveTo(x, top - 1 * ratio);
      pen.lineTo(x - 5 * ratio, top - 10 * ratio);
      pen.lineTo(x + 5 * ratio, top - 10 * ratio);
      pen.fill();
    }
    pen.restore();
  }
}

/** Data: x, lower, upper, expected, value. */
export function valueChart(options: Options): Chart {
  return new Chart(options, () => {
    const paint = colours();
    return {
      series: [
        { stroke: "transparent", points: { show: false }, width: 0 },
        { stroke: "transparent", points: { show: false }, width: 0 },
        { stroke: paint.blue, width: 1.4, dash: [5, 4], points: { show: false } },
        { stroke: paint.ink, width: 1.5, points: { show: false } },
      ],
      bands: [{ series: [2, 1], fill: paint.blueSoft }],
      y: valueRange,
      threshold: false,
      digits: marked,
    };
  });
}

/** Data: x, score. */
export function scoreChart(options: Options): Chart {
  return new Chart(options, () => ({
    series: [{ stroke: colours().ink, width: 1.4, points: { show: false } }],
    y: (_, __, max) => [0, Math.max(1.5, 1.12 * (max ?? 0))],
    threshold: true,
    digits: (value) => score(value).replace(/\.00$/, "").replace(/(\.\d)0$/, "$1"),
  }));
}

const NOISE = 1e-6; // of a number: readings are held with some seven digits, and a chart of the last one would show what nobody measured

/** All of the value and of what was expected; of the band no more than once the same again: a young stream's is wide. */
function valueRange(plot: uPlot): uPlot.Range.MinMax {
  const t = plot.data[0];
  let [first, last] = plot.series[0]!.idxs ?? [0, t.length - 1];
  while (t[first - 1] === t[first]! && first) first--; // of events of one instant, such as those of a bulk without times, uPlot names one
  while (t[last + 1] === t[last]! && last + 1 < t.length) last++;
  let [min, max] = extent([plot.data[3]!, plot.data[4]!], first, last);
  if (min > max) return [0, 1];
  const [low, high] = extent([plot.data[1]!, plot.data[2]!], first, last);
  const height = Math.max(Math.abs(min), Math.abs(max));
  const span = max - min > NOISE * height ? max - min : height * 0.1 || 1;
  if (low <= high) {
    min = Math.min(min, Math.max(low, min - span));
    max = Math.max(max, Math.min(high, max + span));
  }
  if (max - min <= NOISE * height) [min, max] = [min - span, max + span];
  const margin = 0.06 * (max - min || span);
  return [min - margin, max + margin];
}

function extent(columns: ArrayLike<number | null | undefined>[], first: number, last: number): [number, number] {
  let min = Infinity;
  let max = -Infinity;
  for (const column of columns)
    for (let i = first; i <= last; i++) {
      const value = column[i];
      if (value === null || value === undefined) continue;
      if (value < min) min = value;
      if (value > max) max = value;
    }
  return [min, max];
}

function tick(split: number, splits: number[], time: boolean): string {
  if (!time) return number(split);
  const span = (splits[splits.length - 1] ?? 0) - (splits[0] ?? 0);
  const step = (splits[1] ?? splits[0] ?? 0) - (splits[0] ?? 0);
  const date = new Date(1000 * split);
  const two = (n: number): string => String(n).padStart(2, "0");
  const midnight = span > 20 * 3600 && date.getHours() + date.getMinutes() === 0;
  if (step >= 86_400 || midnight) return date.toLocaleDateString("en-GB", { day: "numeric", month: "short" });
  return `${two(date.getHours())}:${two(date.getMinutes())}${span < 1800 ? `:${two(date.getSeconds())}` : ""}`;
}

/** Where nothing came for long the line is broken: it would say what nobody saw. */
function breaks(plot: uPlot, _: number, first: number, last: number, gaps: uPlot.Series.Gaps): uPlot.Series.Gaps {
  const x = plot.data[0];
  if (last - first < 8) return gaps;
  const steps: number[] = [];
  const stride = Math.max(1, Math.floor((last - first) / 64));
  for (let i = first + 1; i <= last; i += stride) steps.push(x[i]! - x[i - 1]!);
  const usual = steps.sort((a, b) => a - b)[steps.length >> 1]!;
  if (usual <= 0) return gaps;
  for (let i = first + 1; i <= last; i++)
    if (x[i]! - x[i - 1]! > 20 * usual) gaps.push([Math.round(plot.valToPos(x[i - 1]!, "x", true)), Math.round(plot.valToPos(x[i]!, "x", true))]);
  return gaps.sort((a, b) => a[0] - b[0]);
}

export function legend(entries: [string, string][]): HTMLElement {
  return h("ul", { class: "legend" }, ...entries.map(([kind, words]) => h("li", { class: `l-${kind}` }, words)));
}
