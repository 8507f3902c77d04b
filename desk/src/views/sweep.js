// The sweep: its settings, its chart, and the texts behind each point.

import { html } from "htm/preact";
import * as desk from "../desk.js";
import * as sweep from "../sweep.js";
import { Front } from "./charts.js";
import { NumberField } from "./fields.js";

const ACROSS = "divergence from the base, nats a token";
const title = (measure) => (measure === "length" ? "length in tokens" : measure);

export function Sweep() {
  if (!desk.faders.value.length) return null;
  return html`
    <details class="panel sweep">
      <summary>Sweep a fader <small>what does it buy, and how far from the base?</small></summary>
      <${Range} />
      <${Progress} />
      ${sweep.total.value > 0 && html`<${Found} />`}
    </details>
  `;
}

function Range() {
  const { from, to, positions, texts } = sweep.settings;
  const can = desk.connection.value === "ready" && !desk.problem.value;
  return html`
    <div class="range">
      <label class="field">
        <span>Fader</span>
        <select
          value=${sweep.fader.value}
          onChange=${(event) => (sweep.settings.fader.value = event.target.value)}
        >
          ${desk.faders.value.map((name) => html`<option value=${name}>${name}</option>`)}
        </select>
      </label>
      <${NumberField} label="From" value=${from} min=${-100} max=${100} step=${0.25} />
      <${NumberField} label="To" value=${to} min=${-100} max=${100} step=${0.25} />
      <${NumberField}
        label="Positions"
        value=${positions}
        min=${sweep.POSITIONS[0]}
        max=${sweep.POSITIONS[1]}
        step=${1}
      />
      <${NumberField}
        label="Texts each"
        value=${texts}
        min=${sweep.TEXTS[0]}
        max=${sweep.TEXTS[1]}
        step=${1}
      />
      <label class="field">
        <span>Measure</span>
        <select
          value=${sweep.chosen.value}
          onChange=${(event) => (sweep.measure.value = event.target.value)}
        >
          ${sweep.measures.value.map((name) => html`<option value=${name}>${name}</option>`)}
        </select>
      </label>
      <button
        type="button"
        class="main"
        disabled=${!can && !sweep.running.value}
        onClick=${sweep.running.value ? sweep.stop : sweep.run}
      >
        ${sweep.running.value ? "Stop the sweep" : "Sweep"}
      </button>
    </div>
    <p class="hint">
      Other faders stand as in strip ${desk.strips.value[0]?.name}; each position has the same
      seeds.
    </p>
  `;
}

function Progress() {
  const [done, total] = [sweep.done.value, sweep.total.value];
  if (!total) return null;
  const failed = sweep.points.value
    .flatMap((point) => point.takes)
    .find((take) => take.state.value === "failed");
  return html`
    <progress max=${total} value=${done} aria-label="Texts of the sweep">${done}</progress>
    <p class="hint">${done} of ${total} texts${sweep.running.value ? "…" : "."}</p>
    ${failed && html`<p class="problem" role="alert">A text failed: ${failed.note}</p>`}
  `;
}

function Found() {
  const measure = sweep.chosen.value;
  sweep.done.value;
  const rows = sweep.points.value.map((point) => ({ point, ...sweep.measured(point, measure) }));
  const drawn = rows
    .filter(({ across, up }) => across !== null && up !== null)
    .map(({ point, across, up }) => ({ across, up, name: String(point.position) }));
  const [{ fader: swept, value }] = sweep.points.value;
  return html`
    ${
      drawn.length > 0 &&
      html`<${Front}
        label=${`${title(measure)} against ${ACROSS}, at ${drawn.length} positions of ${swept}`}
        across=${ACROSS}
        up=${title(measure)}
        points=${drawn}
      />`
    }
    ${
      measure !== "length" &&
      measure !== value &&
      html`<p class="hint">Sweep again to have <code>${measure}</code> of the texts.</p>`
    }
    <ol class="points">
      ${rows.map((row) => html`<${Row} key=${row.point.position} measure=${measure} ...${row} />`)}
    </ol>
  `;
}

/** One position: its figures and, when opened, its texts. */
function Row({ point, across, up, measure }) {
  const figure = (x) => (x === null ? "–" : Number(x.toPrecision(3)).toString());
  const toStrip = () => {
    const weights = { ...desk.strips.value[0]?.sent, [point.fader]: point.position };
    desk.addStrip({ weights });
  };
  const full = desk.strips.value.length >= desk.STRIPS;
  return html`
    <li>
      <details>
        <summary>
          <b><code>${point.fader}</code> = ${point.position}</b>
          <span>${figure(across)} nats a token</span>
          <span>${figure(up)} ${measure === "length" ? "tokens" : measure}</span>
        </summary>
        ${point.takes.map((take) => {
          take.version.value;
          return html`<p class="text">${take.text || take.note.value || "Nothing yet."}</p>`;
        })}
        <button type="button" class="quiet" disabled=${full} onClick=${toStrip}>
          ${full ? "All strips are taken" : "Open as a strip"}
        </button>
      </details>
    </li>
  `;
}
