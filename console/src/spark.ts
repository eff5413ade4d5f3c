/** A row's picture: the recent values as a line, and under it a strip with a cell for each event, by its score. */

import { BITS } from "./api";
import { colours } from "./theme";

export const POINTS = 96;

/** The last POINTS events of a stream, oldest first. */
export class Trace {
  readonly value = new Float64Array(POINTS).fill(NaN);
  readonly score = new Float64Array(POINTS).fill(NaN);
  readonly bits = new Uint8Array(POINTS);
  length = 0;

  push(value: number | null, score: number | null, bits: number): void {
    if (this.length === POINTS) {
      this.value.copyWithin(0, 1);
      this.score.copyWithin(0, 1);
      this.bits.copyWithin(0, 1);
      this.length--;
    }
    this.value[this.length] = value ?? NaN;
    this.score[this.length] = score ?? NaN;
    this.bits[this.length] = bits;
    this.length++;
  }
}

export function draw(canvas: HTMLCanvasElement, trace: Trace, width: number, height: number, ofScore: boolean): void {
  const ratio = Math.min(2, devicePixelRatio || 1);
  if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
  }
  const pen = canvas.getContext("2d");
  if (!pen) return;
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  pen.clearRect(0, 0, width, height);
  const strip = 9;
  line(pen, ofScore ? trace.score : trace.value, trace, width, height - strip - 5);
  cells(pen, trace, width, height - strip, strip);
}

function line(pen: CanvasRenderingContext2D, numbers: Float64Array, trace: Trace, width: number, height: number): void {
  const paint = colours();
  let least = Infinity;
  let most = -Infinity;
  for (let i = 0; i < trace.length; i++) {
    const value = numbers[i]!;
    if (value < least) least = value;
    if (value > most) most = value;
  }
  if (most < least) return;
  const step = width / (POINTS - 1);
  const first = POINTS - trace.length;
  const span = most - least;
  const y = (value: number): number => (span > 0 ? 2 + (height - 4) * (1 - (value - least) / span) : height / 2);
  pen.lineWidth = 1.25;
  pen.lineJoin = "round";
  pen.strokeStyle = paint.ink;
  pen.beginPath();
  let pen_down = false;
  for (let i = 0; i < trace.length; i++) {
    const value = numbers[i]!;
    if (Number.isNaN(value)) pen_down = false;
    else {
      const x = (first + i) * step;
      if (pen_down) pen.lineTo(x, y(value));
      else pen.moveTo(x, y(value));
      pen_down = true;
    }
  }
  pen.stroke();
  pen.fillStyle = paint.alarmEdge;
  for (let i = 0; i < trace.length; i++) {
    const value = numbers[i]!;
    if (!(trace.bits[i]! & BITS.onset) || Number.isNaN(value)) continue;
    pen.beginPath();
    pen.arc((first + i) * step, y(value), 3, 0, 7);
    pen.fill();
  }
}

/** Half-high and blue below the threshold, the stronger the nearer; full and vermilion above it: told apart without colour, too. */
function cells(pen: CanvasRenderingContext2D, trace: Trace, width: number, top: number, height: number): void {
  const paint = colours();
  const step = width / POINTS;
  const first = POINTS - trace.length;
  for (let i = 0; i < trace.length; i++) {
    const score = trace.score[i]!;
    const anomalous = (trace.bits[i]! & BITS.anomaly) !== 0;
    const cold = Number.isNaN(score);
    const tall = anomalous ? height : height / 2 - 0.5;
    pen.globalAlpha = cold ? 0.35 : anomalous ? Math.min(1, 0.65 + 0.2 * Math.max(0, score - 1)) : 0.12 + 0.6 * Math.min(1, Math.max(0, score));
    pen.fillStyle = cold ? paint.line : anomalous ? paint.alarmEdge : paint.blue;
    pen.fillRect((first + i) * step, top + height - tall, Math.max(1, step - 0.6), tall);
  }
  pen.globalAlpha = 1;
}
