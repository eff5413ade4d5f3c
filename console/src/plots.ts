/** Asked against seen, both on logarithmic axes; the line is where they are equal. */

import { h } from "./dom";
import { colours, onTheme } from "./theme";

interface Point {
  x: number;
  y: number;
}

/** `least`: a share below which nothing can be seen, one event of all. */
export function loglog(points: Point[], least: number, label: string): { element: HTMLElement; leave: () => void } {
  const canvas = h("canvas", { class: "loglog", role: "img", "aria-label": `${label}, against p; values in the table below` });
  const element = h("div", { class: "chart" }, canvas);
  const paint = (): void => draw(canvas, points, least);
  const unwatch = onTheme(paint);
  const resized = new ResizeObserver(paint);
  resized.observe(element);
  return {
    element,
    leave: () => {
      unwatch();
      resized.disconnect();
    },
  };
}

function draw(canvas: HTMLCanvasElement, points: Point[], least: number): void {
  const [width, height] = [canvas.clientWidth, canvas.clientHeight];
  const pen = canvas.getContext("2d");
  if (!pen || !width) return;
  const ratio = Math.min(2, devicePixelRatio || 1);
  canvas.width = width * ratio;
  canvas.height = height * ratio;
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  const paint = colours();
  const [left, bottom, right, top] = [66, height - 24, width - 10, 8];
  const low = -5;
  const x = (value: number): number => left + ((Math.log10(value) - low) / -low) * (right - left);
  const y = (value: number): number => bottom - ((Math.max(low, Math.log10(value)) - low) / -low) * (bottom - top);
  pen.font = paint.font;
  pen.fillStyle = paint.quiet;
  pen.strokeStyle = paint.line;
  for (let power = low; power <= 0; power++) {
    const value = 10 ** power;
    line(pen, left, y(value), right, y(value));
    pen.textAlign = "right";
    pen.fillText(power === 0 ? "all" : `1 in ${short(1 / value)}`, left - 6, y(value) + 4);
    pen.textAlign = power === 0 ? "right" : power === low ? "left" : "center";
    if (power === low + 1 && right - left < 300) continue; // no room beside the first
    pen.fillText(power === 0 ? "p = 1" : short(value), x(value), bottom + 17);
  }
  pen.strokeStyle = paint.blue;
  pen.setLineDash([5, 4]);
  line(pen, x(10 ** low), y(10 ** low), x(1), y(1));
  pen.setLineDash([]);
  pen.strokeStyle = paint.ink;
  pen.lineWidth = 1.6;
  const shown = points.filter((point) => point.y > 0);
  pen.beginPath();
  shown.forEach((point, i) => (i ? pen.lineTo(x(point.x), y(point.y)) : pen.moveTo(x(point.x), y(point.y))));
  pen.stroke();
  for (const point of shown) {
    pen.beginPath();
    pen.arc(x(point.x), y(point.y), 3.5, 0, 7);
    // hollow: fewer than ten events say little
    pen.fillStyle = point.y >= 10 * least ? paint.ink : paint.paper;
    pen.fill();
    pen.stroke();
  }
}

function line(pen: CanvasRenderingContext2D, x0: number, y0: number, x1: number, y1: number): void {
  pen.beginPath();
  pen.moveTo(x0, y0);
  pen.lineTo(x1, y1);
  pen.stroke();
}

function short(value: number): string {
  if (value >= 1) return value >= 1000 ? `${Math.round(value / 1000)}k` : String(Math.round(value));
  return value >= 0.001 ? String(Number(value.toPrecision(1))) : value.toExponential(0).replace("e-", "e−");
}
