// What all strips share: the prompt and the buttons below it, the formula, the sampling.

import { html } from "htm/preact";
import * as desk from "../desk.js";
import { oneFaderEach, problem } from "../formula.js";
import { NumberField } from "./fields.js";

export function Prompt() {
  const { prompt } = desk.settings;
  return html`
    <section class="prompt" aria-label="Prompt">
      <label class="field">
        <span>Prompt</span>
        <textarea
          rows="3"
          placeholder="Ask something, or pick an example"
          value=${prompt.value}
          onInput=${(event) => (prompt.value = event.target.value)}
        ></textarea>
      </label>
      <${Transport} />
      <div class="examples" role="group" aria-label="Examples of prompts">
        ${desk.EXAMPLES.map(
          (text) =>
            html`<button
              type="button"
              aria-pressed=${prompt.value === text}
              onClick=${() => (prompt.value = text)}
            >
              ${text}
            </button>`,
        )}
      </div>
    </section>
  `;
}

function Transport() {
  const can = desk.connection.value === "ready" && !desk.problem.value;
  return html`
    <div class="transport">
      <button type="button" class="main" disabled=${!can} onClick=${desk.writeAll}>
        <span aria-hidden="true">▶</span> Write
      </button>
      <button type="button" disabled=${!desk.writing.value} onClick=${desk.stopAll}>
        <span aria-hidden="true">■</span> Stop
      </button>
      <p class="hint">
        ${desk.problem.value || html`<kbd>Ctrl</kbd> <kbd>Enter</kbd> writes, <kbd>Esc</kbd> stops`}
      </p>
    </div>
  `;
}

export function Settings() {
  return html`
    <section class="settings" aria-label="Settings">
      <${Formula} />
      <${Chat} />
      <${Sampling} />
    </section>
  `;
}

function Chat() {
  const { chat } = desk.settings;
  if (!desk.server.value.has_chat_template) return null;
  return html`
    <${Systems} />
    <label class="check">
      <input
        type="checkbox"
        checked=${chat.value}
        onChange=${(event) => (chat.value = event.target.checked)}
      />
      <span>Send it as a chat <small>(else the models go on with it)</small></span>
    </label>
  `;
}

/** System prompts, of all terms and of single ones. Plain texts have none. */
function Systems() {
  const { chat, system } = desk.settings;
  if (!chat.value) return null;
  const { terms } = desk.server.value;
  const set = (term, text) => (desk.systems.value = { ...desk.systems.value, [term]: text });
  const own = terms.filter((term) => desk.systems.value[term]).length;
  const count = own + (system.value ? 1 : 0);
  const area = (label, value, onInput) => html`
    <label class="field">
      <span>${label}</span>
      <textarea
        rows="2"
        value=${value}
        onInput=${(event) => onInput(event.target.value)}
      ></textarea>
    </label>
  `;
  return html`
    <details>
      <summary>System prompts ${count > 0 && html`<small>${count} set</small>`}</summary>
      ${area("For all models", system.value, (text) => (system.value = text))}
      ${terms.map((term) =>
        area(html`For <code>${term}</code> alone`, desk.systems.value[term] ?? "", (text) =>
          set(term, text),
        ),
      )}
    </details>
  `;
}

function Formula() {
  const { blend } = desk.settings;
  const { terms, values } = desk.server.value;
  const each = oneFaderEach(terms, values);
  const refused = desk.strips.value.find((strip) => {
    const take = strip.take.value;
    return (
      take?.state.value === "failed" && take.refused === "blend" && take.body.blend === blend.value
    );
  });
  const wrong = refused ? refused.take.value.note.value : problem(blend.value);
  return html`
    <div class="field">
      <label for="blend">Formula</label>
      <textarea
        id="blend"
        class="code"
        rows="2"
        spellcheck=${false}
        autocapitalize="off"
        aria-invalid=${Boolean(wrong)}
        aria-describedby="blend-help"
        value=${blend.value}
        onInput=${(event) => (blend.value = event.target.value)}
      ></textarea>
      <p id="blend-help">
        ${
          wrong
            ? html`<span class="problem shown">${wrong}</span>`
            : html`Models: ${list(terms)}${values.length > 0 && html`; values: ${list(values)}`}.
              Any other name is a fader.`
        }
      </p>
      ${
        blend.value !== each &&
        terms.length + values.length > 1 &&
        html`<button type="button" class="quiet" onClick=${() => (blend.value = each)}>
          One fader for each
        </button>`
      }
    </div>
  `;
}

const list = (names) => names.map((name, i) => html`${i > 0 && ", "}<code>${name}</code>`);

function Sampling() {
  const { temperature, top_p: topP, max_tokens: limit, seed } = desk.settings;
  const most = desk.server.value.limits.max_tokens ?? 4096;
  const another = () => (seed.value = Math.floor(Math.random() * 1e6));
  return html`
    <div class="sampling">
      <${NumberField} label="Temperature" value=${temperature} min=${0} max=${2} step=${0.1} />
      <${NumberField} label="Top-p" value=${topP} min=${0.05} max=${1} step=${0.05} />
      <${NumberField} label="Tokens" value=${limit} min=${1} max=${most} step=${1} />
      <${NumberField} label="Seed" value=${seed} min=${0} max=${2 ** 53 - 1} step=${1} />
    </div>
    <button type="button" class="quiet another" onClick=${another}>Another seed</button>
    <label class="check">
      <input
        type="checkbox"
        checked=${desk.follow.value}
        onChange=${(event) => (desk.follow.value = event.target.checked)}
      />
      Write a finished text anew when its fader moves
    </label>
  `;
}
