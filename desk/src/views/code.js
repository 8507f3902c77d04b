// What is set, as a link and as code.

import { useSignal } from "@preact/signals";
import { html } from "htm/preact";
import * as code from "../code.js";
import * as desk from "../desk.js";
import { filled } from "../formula.js";
import { CopyButton } from "./fields.js";

export function Code() {
  const chosen = useSignal("A");
  const strips = desk.strips.value;
  const strip = strips.find((x) => x.name === chosen.value) ?? strips[0];
  if (!strip) return null;
  const request = desk.request(strip.sent);
  const url = new URL(desk.path(), document.baseURI).href;
  const blocks = {
    Formula: filled(request.blend, request.weights),
    Python: code.python(request, desk.known.value),
    "A session in Python": code.session(request),
    curl: code.curl(request, url, desk.server.value.needs_key),
  };
  return html`
    <details class="panel code">
      <summary>Take it with you <small>a link, and the code that writes this</small></summary>
      <div class="range">
        ${
          strips.length > 1 &&
          html`<label class="field">
            <span>Strip</span>
            <select value=${strip.name} onChange=${(event) => (chosen.value = event.target.value)}>
              ${strips.map(({ name }) => html`<option value=${name}>${name}</option>`)}
            </select>
          </label>`
        }
        <${CopyButton}
          label="Copy a link to these settings"
          text=${() => new URL(desk.address.value, location.href).href}
        />
      </div>
      ${Object.entries(blocks).map(
        ([title, text]) => html`
          <figure key=${title}>
            <figcaption>${title} <${CopyButton} label="Copy" text=${() => text} /></figcaption>
            <pre tabindex="0"><code>${text}</code></pre>
          </figure>
        `,
      )}
    </details>
  `;
}
