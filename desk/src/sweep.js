// A sweep: the prompt is written at several positions of one fader, and measured.

import { computed, signal } from "@preact/signals";
import * as desk from "./desk.js";

export const POSITIONS = [2, 21];
export const TEXTS = [1, 8];

export const settings = {
  fader: signal(""),
  from: signal(-2),
  to: signal(2),
  positions: signal(9),
  texts: signal(2),
};
export const points = signal([]); // {fader, position, takes, value}; `value` has scored the takes
export const measure = signal(""); // what is drawn upwards: the name of a value, or "length"

/** The fader that is swept: the one that was chosen, if the formula still has it. */
export const fader = computed(() => {
  const chosen = settings.fader.value;
  return desk.faders.value.includes(chosen) ? chosen : (desk.faders.value[0] ?? "");
});

const takes = computed(() => points.value.flatMap((point) => point.takes));
export const done = computed(() => takes.value.filter((take) => !take.active).length);
export const total = computed(() => takes.value.length);
export const running = computed(() => done.value < total.value);

/** What can be drawn upwards: values that the server has loaded for searches, and the length. */
export const measures = computed(() => [...(desk.server.value?.searches ?? []), "length"]);
export const chosen = computed(() =>
  measures.value.includes(measure.value) ? measure.value : measures.value[0],
);

const rounded = (x) => Number(x.toFixed(4));
const whole = (x, [low, high]) => Math.min(Math.max(Math.round(x), low), high);

/**
 * Write and measure. Other faders stand as in the first strip; each position has the same seeds.
 * A value scores a text that is the best of one, since it is searches that ask values.
 */
export function run() {
  stop();
  const { from, to, positions, texts } = settings;
  const value = chosen.value;
  const scored = value === "length" ? {} : { search: { best_of: 1, value } };
  const [n, each] = [whole(positions.value, POSITIONS), whole(texts.value, TEXTS)];
  points.value = Array.from({ length: n }, (_, i) => {
    const position = rounded(from.value + ((to.value - from.value) * i) / (n - 1));
    const weights = { ...desk.strips.value[0]?.sent, [fader.value]: position };
    const begun = Array.from({ length: each }, (_, j) =>
      desk.begin(weights, { seed: desk.settings.seed.value + j, ...scored }),
    );
    return { fader: fader.value, position, takes: begun, value };
  });
  for (const take of takes.value) take.write();
}

export function stop() {
  for (const take of takes.value) take.stop();
}

const mean = (numbers) =>
  numbers.length ? numbers.reduce((a, b) => a + b, 0) / numbers.length : null;

/** What was measured at a point: `{across, up}`, null where there is nothing yet. */
export function measured(point, name) {
  const written = point.takes.filter((take) => take.state.value === "done" && take.count > 0);
  const scored = name === point.value ? written.map((take) => take.value) : [];
  const up = name === "length" ? written.map((take) => take.count) : scored;
  const across = written.map((take) => take.divergence);
  return { across: mean(across.filter(Number.isFinite)), up: mean(up.filter(Number.isFinite)) };
}
