// The strips side by side: each has faders, what was measured, and the text written at them.

import { html } from "htm/preact";
import * as desk from "../desk.js";
import { Channel } from "./channel.js";
import { Divergence } from "./charts.js";
import { Text } from "./text.js";

const MANY = 3; // faders, more of which stand closer

/** What the colours mean. */
export function Legend() {
  return html`
    <div class="legend">
      <ul aria-label="Colours of the faders">
        ${desk.channels.value.map(
          (name) => html`<li class=${desk.colour(name)}><i></i><code>${name}</code></li>`,
        )}
      </ul>
      <p>
        A word has the colour of the fader that moved it most away from the base, stronger for more;
        dashes: it came against that fader. Point at a word or tap it for the numbers.
      </p>
    </div>
  `;
}

export function Strips() {
  const { value: strips } = desk.strips;
  return html`
    <div class="strips" data-count=${strips.length}>
      ${strips.map((strip) => html`<${Strip} key=${strip.name} strip=${strip} />`)}
    </div>
    ${
      strips.length < desk.STRIPS &&
      html`<button type="button" class="add" onClick=${() => desk.addStrip()}>
        + Add a strip <small>the same prompt at other positions</small>
      </button>`
    }
  `;
}

function Strip({ strip }) {
  const take = strip.take.value;
  const active = take?.active;
  const can = desk.connection.value === "ready" && !desk.problem.value;
  const name = `strip ${strip.name}`;
  return html`
    <article class="strip" aria-label=${`Strip ${strip.name}`}>
      <header>
        <h2>${strip.name}</h2>
        <${State} take=${take} silent=${Object.values(strip.sent).every((x) => x === 0)} />
        <button
          type="button"
          class="icon"
          disabled=${!active && !can}
          aria-label=${active ? `Stop ${name}` : `Write ${name}`}
          onClick=${() => (active ? strip.stop() : strip.write())}
        >
          ${active ? "■" : "▶"}
        </button>
        ${
          desk.strips.value.length > 1 &&
          html`<button
            type="button"
            class="icon"
            aria-label=${`Remove ${name}`}
            onClick=${() => desk.removeStrip(strip)}
          >
            ×
          </button>`
        }
      </header>
      <div class="mixer">
        <div class=${`channels ${desk.faders.value.length > MANY ? "many" : ""}`}>
          ${desk.faders.value.map(
            (fader) => html`<${Channel} key=${fader} strip=${strip} fader=${fader} />`,
          )}
          ${
            desk.faders.value.length === 0 &&
            html`<p class="hint">
              This formula has no faders. A name in it that is no model is one: write${" "}
              <code>w</code> in place of a number.
            </p>`
          }
        </div>
        <${Measured} strip=${strip} take=${take} />
      </div>
      <${Text} strip=${strip} take=${take} />
    </article>
  `;
}

/** How the text stands, in a few words; before there is one, whether anything moves the base. */
function State({ take, silent }) {
  const state = take?.state.value ?? "empty";
  const [note] = (take?.note.value ?? "").split("\n"); // The formula shows where an error in it is.
  const words = {
    empty: silent ? "All faders at 0" : "",
    waiting: note || "Reading the prompt…",
    writing: note || "Writing…",
    done: note,
    stopped: note,
    failed: note,
  };
  const role = state === "failed" ? "alert" : undefined;
  return html`<p class="state ${state}" role=${role}>${words[state]}</p>`;
}

function Measured({ strip, take }) {
  take?.version.value; // It is drawn anew when tokens have come.
  const figure = (x, digits) => (x === null || x === undefined ? "–" : x.toFixed(digits));
  return html`
    <div class="measured">
      <dl>
        <div>
          <dt>from the base</dt>
          <dd>${figure(take?.divergence, 2)} <small>nats a token</small></dd>
        </div>
        <div>
          <dt>speed</dt>
          <dd>${figure(take?.rate, take?.rate < 100 ? 1 : 0)} <small>tokens a second</small></dd>
        </div>
        <div>
          <dt>length</dt>
          <dd>${take ? take.count : "–"} <small>tokens</small></dd>
        </div>
      </dl>
      <${Divergence} name=${strip.name} take=${take} />
    </div>
  `;
}
