// What uPlot draws: divergence token by token, and the points of a sweep.

import { computed, signal } from "@preact/signals";
import { html } from "htm/preact";
import { useEffect, useRef } from "preact/hooks";
import uPlot from "uplot";
import * as desk from "../desk.js";

const FEWEST = 20; // tokens that the first axis has room for
const LEAST = 0.5; // nats that the second axis has room for

// Canvases do not follow the style sheet, so they are drawn anew when its colours change.
const scheme = signal(0);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => scheme.value++);

function colours() {
  const style = getComputedStyle(document.documentElement);
  const of = (name) => style.getPropertyValue(name).trim();
  return { ink: of("--ink"), soft: of("--soft"), line: of("--line"), wash: of("--wash") };
}

/** Options that all charts share. */
function options({ soft, line }, width, height) {
  const axis = {
    stroke: soft,
    font: "12px system-ui, sans-serif",
    labelFont: "12px system-ui, sans-serif",
    grid: { stroke: line, width: 1 },
    ticks: { show: false },
    gap: 4,
  };
  return {
    width,
    height,
    padding: [8, 8, 0, 0],
    legend: { show: false },
    cursor: { show: false },
    scales: { x: { time: false } },
    axes: [
      { ...axis, size: 22, space: 50 },
      { ...axis, size: 36, space: 26 },
    ],
  };
}

/** An element that holds a chart as wide as itself; `make` gives uPlot's options and data. */
function Chart({ label, height, make, data }) {
  const box = useRef();
  const chart = useRef(null);
  const latest = useRef(make);
  latest.current = make;
  const drawnIn = scheme.value;
  useEffect(() => {
    const width = box.current.clientWidth;
    const found = new uPlot(latest.current(colours(), width, height), data, box.current);
    chart.current = found;
    const watch = new ResizeObserver(([entry]) => {
      const wide = Math.floor(entry.contentRect.width);
      if (wide > 0 && wide !== found.width) found.setSize({ width: wide, height });
    });
    watch.observe(box.current);
    return () => {
      watch.disconnect();
      found.destroy();
    };
  }, [drawnIn, height]);
  useEffect(() => chart.current.setData(data), [data]);
  return html`<div class="chart" ref=${box} role="img" aria-label=${label}></div>`;
}

/** The room that the strips' charts share, so that they can be compared: tokens, and nats. */
const room = computed(() => {
  const found = { tokens: FEWEST, nats: LEAST };
  for (const strip of desk.strips.value) {
    const take = strip.take.value;
    take?.version.value;
    found.tokens = Math.max(found.tokens, take?.count ?? 0);
    for (const nats of take?.kl ?? []) found.nats = Math.max(found.nats, nats ?? 0);
  }
  return found;
});

/** Divergence from the base at each token, and lines where faders were moved. */
export function Divergence({ name, take }) {
  const version = take?.version.value;
  const kl = take?.kl ?? [];
  const { tokens, nats } = room.value;
  const now = useRef();
  now.current = { tokens, nats, take };
  const seen = useRef({});
  // The same data is the same object, so that nothing is drawn anew in vain.
  if (seen.current.key !== `${version} ${tokens} ${nats}` || seen.current.take !== take) {
    const data = [kl.map((_, i) => i + 1), [...kl]];
    seen.current = { key: `${version} ${tokens} ${nats}`, take, data };
  }
  const make = (palette, width, height) => ({
    ...options(palette, width, height),
    scales: {
      x: { time: false, range: () => [0, now.current.tokens] },
      y: { range: () => [0, 1.05 * now.current.nats] },
    },
    series: [{}, { stroke: palette.ink, fill: palette.wash, width: 1.5, points: { show: false } }],
    hooks: { draw: [(chart) => drawMoves(chart, now.current.take, palette.soft)] },
  });
  const mean = take?.divergence ?? null;
  const label =
    mean === null
      ? `Divergence of strip ${name} from the base: nothing yet`
      : `Divergence of strip ${name} from the base by token: ${mean.toFixed(2)} nats a token`;
  return html`<${Chart} label=${label} height=${132} make=${make} data=${seen.current.data} />`;
}

function drawMoves(chart, take, stroke) {
  const { ctx: canvas, bbox } = chart;
  canvas.save();
  Object.assign(canvas, { strokeStyle: stroke, lineWidth: devicePixelRatio });
  canvas.setLineDash([3 * devicePixelRatio, 3 * devicePixelRatio]);
  for (const { at } of take?.moves ?? []) {
    const x = chart.valToPos(at, "x", true);
    canvas.beginPath();
    canvas.moveTo(x, bbox.top);
    canvas.lineTo(x, bbox.top + bbox.height);
    canvas.stroke();
  }
  canvas.restore();
}

/** Points joined in their order, each with its name: `points` are `{across, up, name}`. */
export function Front({ label, across, up, points }) {
  const now = useRef();
  now.current = points;
  const sorted = [...points].sort((a, b) => a.across - b.across);
  const data = [sorted.map((p) => p.across), sorted.map((p) => p.up)];
  const make = (palette, width, height) => {
    const common = options(palette, width, height);
    const [x, y] = common.axes;
    return {
      ...common,
      scales: {
        x: { time: false, range: (_, low, high) => padded(low, high) },
        y: { range: (_, low, high) => padded(low, high) },
      },
      axes: [
        { ...x, label: across, labelSize: 20, size: 24 },
        { ...y, label: up, labelSize: 20, size: 44 },
      ],
      series: [
        {},
        {
          stroke: palette.ink,
          paths: () => null,
          points: { show: true, size: 9, fill: palette.ink },
        },
      ],
      hooks: { draw: [(chart) => drawPath(chart, now.current, palette)] },
    };
  };
  return html`<${Chart} key=${up} label=${label} height=${300} make=${make} data=${data} />`;
}

function padded(low, high) {
  if (low === null || high === null) return [0, 1];
  const more = (high - low || Math.abs(high) || 1) * 0.1;
  return [low - more, high + more];
}

function drawPath(chart, points, { soft, ink }) {
  const { ctx: canvas } = chart;
  const at = ({ across, up }) => [chart.valToPos(across, "x", true), chart.valToPos(up, "y", true)];
  canvas.save();
  Object.assign(canvas, { strokeStyle: soft, lineWidth: devicePixelRatio, fillStyle: ink });
  Object.assign(canvas, { font: `${12 * devicePixelRatio}px system-ui, sans-serif` });
  canvas.beginPath();
  for (const point of points) canvas.lineTo(...at(point));
  canvas.stroke();
  for (const point of points) {
    const [x, y] = at(point);
    canvas.fillText(point.name, x + 7 * devicePixelRatio, y - 7 * devicePixelRatio);
  }
  canvas.restore();
}
