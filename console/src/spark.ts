/**
 * A row's picture: the recent values as a line, and under it a strip with a cell for each event, by its score. Set pixel by pixel: without a GPU
 * the browser takes 0.35 ms to stroke and fill the same, this 0.05 ms, and a dozen and a half are drawn ten times a second.
 */

import { BITS } from "./api";
import { pixels, type Pixels } from "./theme";

export const POINTS = 96;
const ROWS = 8;
const STRIP = 9;
const GAP = 5;
const LINE = 1.25;
const DOT = 3;

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

/** What has a place in a list and a picture there. */
export interface Pictured {
  trace: Trace;
  version: number; // grows with each change of it
}

/** Where the pictures lie, in CSS pixels: in a row that is `tall`. */
export interface Frame {
  left: number;
  top: number;
  width: number;
  height: number;
  tall: number;
}

interface Sheet {
  canvas: HTMLCanvasElement;
  pen: CanvasRenderingContext2D;
  shown: ({ one: Pictured; version: number } | undefined)[]; // undefined = nothing was drawn there
}

/** The pictures of a list, those of ROWS places on each canvas: each canvas is a layer that the browser puts together with the others in every frame. */
export class Sheets {
  private readonly sheets = new Map<number, Sheet>();
  private readonly spare: Sheet[] = [];
  private frame: Frame | null = null;
  private image = new ImageData(1, 1);
  private ratio = 1;

  constructor(private readonly parent: HTMLElement) {}

  get ready(): boolean {
    return this.frame !== null && this.ratio === sharpness();
  }

  /** Everything is drawn again, there; null: as soon as it is known where, and until then what is there stays. */
  lie(frame: Frame | null): void {
    this.frame = frame;
    if (!frame) return;
    for (const number of this.sheets.keys()) this.release(number);
    for (const { canvas } of this.spare.splice(0)) canvas.remove();
    this.ratio = sharpness();
    this.image = new ImageData(this.device(frame.width), this.device(frame.height));
  }

  /** Of the places from `first` to before `last` what is new there, and of what has changed `room` pictures; whether some are left. */
  draw(order: Pictured[], first: number, last: number, room: number, ofScore: boolean): boolean {
    const [begin, end] = [Math.floor(first / ROWS), Math.ceil(last / ROWS)];
    for (const number of this.sheets.keys()) if (number < begin || number >= end) this.release(number);
    let left = false;
    for (let place = first; place < last; place++) {
      const one = order[place]!;
      const sheet = this.sheets.get(Math.floor(place / ROWS)) ?? this.sheet(Math.floor(place / ROWS));
      const shown = sheet.shown[place % ROWS];
      const other = shown?.one !== one;
      if (!other && shown?.version === one.version) continue;
      if (other || room-- > 0) this.paint(sheet, place % ROWS, one, ofScore);
      else left = true;
    }
    return left;
  }

  private device(length: number): number {
    return Math.max(1, Math.round(length * this.ratio));
  }

  private sheet(number: number): Sheet {
    const { left, width, tall } = this.frame!;
    const sheet = this.spare.pop() ?? this.made();
    sheet.canvas.style.top = `${number * ROWS * tall}px`;
    sheet.canvas.style.left = `${left}px`;
    sheet.canvas.style.width = `${width}px`;
    sheet.canvas.style.height = `${ROWS * tall}px`;
    if (!sheet.canvas.isConnected) this.parent.append(sheet.canvas);
    this.sheets.set(number, sheet);
    return sheet;
  }

  private made(): Sheet {
    const canvas = document.createElement("canvas");
    canvas.width = this.image.width;
    canvas.height = this.device(ROWS * this.frame!.tall);
    canvas.setAttribute("aria-hidden", "true");
    return { canvas, pen: canvas.getContext("2d", { willReadFrequently: true })!, shown: [] };
  }

  private release(number: number): void {
    const sheet = this.sheets.get(number)!;
    this.sheets.delete(number);
    sheet.shown = [];
    sheet.pen.clearRect(0, 0, sheet.canvas.width, sheet.canvas.height);
    this.spare.push(sheet);
  }

  private paint(sheet: Sheet, row: number, one: Pictured, ofScore: boolean): void {
    const { top, tall } = this.frame!;
    const { image } = this;
    const pixel = new Uint32Array(image.data.buffer);
    pixel.fill(0);
    picture(pixel, image.width, image.height, one.trace, this.ratio, ofScore);
    sheet.pen.putImageData(image, 0, Math.round((row * tall + top) * this.ratio));
    sheet.shown[row] = { one, version: one.version };
  }
}

/** Pixels of the device for one of CSS: it changes also where nothing is resized, with a window that is moved to another screen. */
const sharpness = (): number => Math.min(2, devicePixelRatio || 1);

/** Each pixel has alpha, blue, green, red from its highest byte down. */
function picture(pixel: Uint32Array, width: number, height: number, trace: Trace, ratio: number, ofScore: boolean): void {
  const paint = pixels();
  const strip = Math.round(STRIP * ratio);
  line(pixel, trace, ofScore ? trace.score : trace.value, width, height - strip - Math.round(GAP * ratio), ratio, paint);
  cells(pixel, trace, width, height - strip, strip, paint);
}

const edge = (place: number, width: number): number => Math.round((place * width) / POINTS);
const middle = (place: number, width: number): number => Math.round(((place + 0.5) * width) / POINTS);

function line(pixel: Uint32Array, trace: Trace, numbers: Float64Array, width: number, height: number, ratio: number, paint: Pixels): void {
  let least = Infinity;
  let most = -Infinity;
  for (let i = 0; i < trace.length; i++) {
    const value = numbers[i]!;
    if (value < least) least = value;
    if (value > most) most = value;
  }
  if (most < least) return;
  const first = POINTS - trace.length;
  const margin = DOT * ratio; // an onset's dot is seen whole
  const scale = most > least ? (height - 2 * margin) / (most - least) : 0;
  const y = (i: number): number => (scale ? height - margin - (numbers[i]! - least) * scale : height / 2);
  for (let i = 1; i < trace.length; i++) segment(pixel, middle(first + i - 1, width), y(i - 1), middle(first + i, width), y(i), (LINE * ratio) / 2, width, paint.ink);
  for (let i = 0; i < trace.length; i++) if (trace.bits[i]! & BITS.onset && !Number.isNaN(numbers[i]!)) dot(pixel, middle(first + i, width), y(i), DOT * ratio, width, height, paint.alarmEdge);
}

/** Of each column of pixels what the line crosses within it, the outermost pixels by how much of them it covers. Ends lie between columns. */
function segment(pixel: Uint32Array, x0: number, y0: number, x1: number, y1: number, half: number, width: number, colour: number): void {
  if (Number.isNaN(y0) || Number.isNaN(y1)) return;
  const slope = (y1 - y0) / (x1 - x0);
  for (let x = x0; x < x1; x++) {
    const left = y0 + slope * (x - x0);
    const upper = Math.min(left, left + slope) - half;
    const lower = Math.max(left, left + slope) + half;
    for (let row = Math.floor(upper); row < lower; row++) {
      const covered = Math.min(row + 1, lower) - Math.max(row, upper);
      const at = row * width + x;
      pixel[at] = shade(colour, covered, pixel[at]! >>> 24);
    }
  }
}

function dot(pixel: Uint32Array, x: number, y: number, radius: number, width: number, height: number, colour: number): void {
  for (let row = Math.max(0, Math.floor(y - radius)); row < Math.min(height, y + radius); row++)
    for (let column = Math.max(0, Math.floor(x - radius)); column < Math.min(width, x + radius); column++) {
      const covered = radius + 0.5 - Math.hypot(column + 0.5 - x, row + 0.5 - y);
      if (covered > 0) pixel[row * width + column] = shade(colour, Math.min(1, covered), 0);
    }
}

/** Half-high and blue below the threshold, the stronger the nearer; full and vermilion above it: told apart without colour, too. */
function cells(pixel: Uint32Array, trace: Trace, width: number, top: number, height: number, paint: Pixels): void {
  const first = POINTS - trace.length;
  const low = top + Math.round(height / 2);
  for (let i = 0; i < trace.length; i++) {
    const score = trace.score[i]!;
    const anomalous = (trace.bits[i]! & BITS.anomaly) !== 0;
    const cold = Number.isNaN(score);
    const strength = cold ? 0.35 : anomalous ? Math.min(1, 0.65 + 0.2 * Math.max(0, score - 1)) : 0.12 + 0.6 * Math.min(1, Math.max(0, score));
    const colour = shade(cold ? paint.line : anomalous ? paint.alarmEdge : paint.blue, strength, 0);
    const left = edge(first + i, width);
    const right = Math.max(left + 1, edge(first + i + 1, width) - 1);
    pixel.fill(colour, low * width + left, low * width + right);
    if (anomalous) for (let row = top; row < low; row++) pixel.fill(colour, row * width + left, row * width + right);
  }
  for (let row = low + 1; row < top + height; row++) pixel.copyWithin(row * width, low * width, (low + 1) * width);
}

/** A colour by how much of it is seen, no less than what `before` was. */
const shade = (colour: number, share: number, before: number): number => ((Math.max(before, Math.round(255 * share)) << 24) | colour) >>> 0;
