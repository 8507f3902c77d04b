// One fader of a strip: the fader itself with its meter, its number, mute and solo.

import { html } from "htm/preact";
import * as desk from "../desk.js";
import { moved } from "../formula.js";
import { recently } from "../tokens.js";
import { NumberInput } from "./fields.js";

const REACH = 2; // how far a fader goes to either side, unless its number is beyond
const STEP = 0.05;
const FULL = 1; // nats a token at which a meter is full

export function Channel({ strip, fader }) {
  const x = strip.position(fader);
  const reach = Math.max(REACH, Math.ceil(Math.abs(x)));
  const [muted, soloed] = [strip.muted.value.has(fader), strip.soloed.value.has(fader)];
  const silent = !strip.sounds(fader);
  const what = moved(desk.settings.blend.value, fader);
  const named = `${fader} of strip ${strip.name}`;
  const kind = `channel ${desk.colour(fader)}${silent ? " silent" : ""}`;
  const onRange = (event) => strip.move(fader, Number(event.target.value));
  return html`
    <div class=${kind} role="group" aria-label=${named}>
      <div class="name">
        <code title=${fader}>${fader}</code>
        ${what && html`<small title=${what}>${what}</small>`}
      </div>
      <div class="slot">
        <div class="scale" aria-hidden="true">
          <span>+${reach}</span><span>0</span><span>−${reach}</span>
        </div>
        <input
          type="range"
          min=${-reach}
          max=${reach}
          step=${STEP}
          value=${x}
          aria-label=${what ? `${named}, which moves ${what}` : named}
          aria-valuetext=${silent ? `${x}, silent` : String(x)}
          onInput=${onRange}
          onDblClick=${() => strip.move(fader, 0)}
        />
        <${Meter} take=${strip.take.value} fader=${fader} />
      </div>
      <${NumberInput}
        value=${x}
        step=${STEP}
        aria-label=${`Number of ${named}`}
        onNumber=${(number) => strip.move(fader, number)}
      />
      <div class="switches">
        <button
          type="button"
          class="mute"
          aria-pressed=${muted}
          aria-label=${`Mute ${named}`}
          title="Mute: this fader counts as 0"
          onClick=${() => strip.toggle("muted", fader)}
        >
          M
        </button>
        <button
          type="button"
          class="solo"
          aria-pressed=${soloed}
          aria-label=${`Solo ${named}`}
          title="Solo: all other faders count as 0"
          onClick=${() => strip.toggle("soloed", fader)}
        >
          S
        </button>
      </div>
    </div>
  `;
}

/** How hard the fader pushed the last few tokens, while the text is written. */
function Meter({ take, fader }) {
  take?.version.value;
  const level = take?.state.value === "writing" ? recently(take.tokens, fader) / FULL : 0;
  const height = `${Math.round(100 * Math.min(level, 1))}%`;
  return html`<div class="meter" aria-hidden="true"><i style=${{ "--level": height }}></i></div>`;
}
