// The whole page: what it is, the settings, the strips, the sweep and the code.

import { html } from "htm/preact";
import { useEffect } from "preact/hooks";
import * as desk from "../desk.js";
import * as sweep from "../sweep.js";
import { Code } from "./code.js";
import { Connection } from "./connection.js";
import { Legend, Strips } from "./strips.js";
import { Prompt, Settings } from "./settings.js";
import { Sweep } from "./sweep.js";
import { Tip, closeTip } from "./tip.js";

const TYPED_INTO = "input, textarea, select, button, summary, a, [tabindex]";

/** Control and Enter write from anywhere, space where nothing else takes it; Escape stops. */
function onKey(event) {
  if (event.defaultPrevented || document.querySelector("dialog[open]")) return;
  const free = !event.target.closest?.(TYPED_INTO);
  const enter = event.key === "Enter" && (event.ctrlKey || event.metaKey);
  if (enter || (event.key === " " && free && !event.repeat)) {
    event.preventDefault();
    desk.writeAll();
  } else if (event.key === "Escape" && !closeTip()) {
    desk.stopAll();
    sweep.stop();
  }
}

export function App() {
  useEffect(() => {
    addEventListener("keydown", onKey);
    return () => removeEventListener("keydown", onKey);
  }, []);
  const ready = desk.server.value !== null;
  return html`
    <header>
      <h1>crossfade <span>mixing desk</span></h1>
      <${Connection} />
      <p class="lead">
        Several models write one text together.${" "}
        <strong>
          Push a fader up and the next words lean its way; pull it below 0 and they lean the other
          way</strong
        >, even in the middle of a text.
      </p>
    </header>
    ${
      ready &&
      html`<main>
        <${Prompt} />
        <div class="stage">
          <${Legend} />
          <${Strips} />
          <${Sweep} />
          <${Code} />
        </div>
        <${Settings} />
        <${Tip} />
      </main>`
    }
    <div class="unseen" role="status">${desk.said}</div>
  `;
}
