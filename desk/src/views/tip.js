// The numbers of one token, beside it; on a narrow screen at its foot.

import { signal } from "@preact/signals";
import { html } from "htm/preact";
import { useLayoutEffect, useRef } from "preact/hooks";
import * as desk from "../desk.js";

const GAP = 8; // pixels between a token, its numbers and the edge of the screen

/** The token whose numbers are shown: `{strip, take, at, how, box}`; `how`: hover, tap or keys. */
export const tip = signal(null);

export function showTip(shown) {
  tip.value = shown;
  // Whoever does not see the page hears the numbers, but not those that a mouse passes over.
  if (shown.how !== "hover") desk.said.value = spoken(shown.take.tokens[shown.at]);
}

/** Close it; whether there was one. */
export function closeTip() {
  const open = tip.value !== null;
  tip.value = null;
  return open;
}

const percent = (logprob) => {
  const p = 100 * Math.exp(logprob);
  return p < 0.1 ? "below 0.1 %" : `${p.toFixed(p < 10 ? 1 : 0)} %`;
};
const nats = (x) => `${x < 0 ? "−" : "+"}${Math.abs(x).toFixed(2)}`;

/** The pushes of a token, the strongest first. */
function pushes(token) {
  return Object.entries(token.pushes).sort(([, a], [, b]) => Math.abs(b) - Math.abs(a));
}

function spoken(token) {
  const each = pushes(token).map(
    ([name, x]) => `${name} ${x < 0 ? "against it" : "for it"} by ${Math.abs(x).toFixed(2)} nats`,
  );
  const likely = token.logprob === null ? [] : [`probability ${percent(token.logprob)}`];
  return `${visible(token.text)}: ${[...each, ...likely].join(", ")}`;
}

/** A token's text with its spaces and line breaks to be seen. */
function visible(text) {
  return text.replaceAll("\n", "⏎").replaceAll("\t", "⇥").trim() || "space";
}

export function Tip() {
  const own = useRef();
  const shown = tip.value;
  shown?.take.version.value; // The text may grow, and the token move.
  useLayoutEffect(() => {
    if (!shown || !own.current) return undefined;
    const place = () => {
      const token = shown.box.querySelector(`[data-at="${shown.at}"]`);
      if (!token?.isConnected) return closeTip();
      const [box, { style }] = [token.getClientRects()[0], own.current];
      const { offsetWidth: width, offsetHeight: height } = own.current;
      if (!box) return undefined;
      const below = box.bottom + GAP + height <= innerHeight;
      const most = document.documentElement.clientWidth - width - GAP;
      style.left = `${Math.max(GAP, Math.min(box.left, most))}px`;
      style.top = `${below ? box.bottom + GAP : Math.max(GAP, box.top - GAP - height)}px`;
      return undefined;
    };
    place();
    addEventListener("scroll", place, { passive: true, capture: true });
    addEventListener("resize", place);
    return () => {
      removeEventListener("scroll", place, { capture: true });
      removeEventListener("resize", place);
    };
  });
  const token = shown?.take.tokens[shown.at];
  if (!token) return null;
  const each = pushes(token);
  const most = Math.max(...each.map(([, x]) => Math.abs(x)), 1);
  return html`
    <div ref=${own} class="tip" role="tooltip">
      <p class="token"><q>${visible(token.text)}</q></p>
      ${
        each.length > 0
          ? html`<table>
              <caption>
                moved away from the base, in nats
              </caption>
              ${each.map(
                ([name, x]) =>
                  html`<tr class=${desk.colour(name)}>
                    <th scope="row"><code>${name}</code></th>
                    <td>${nats(x)}</td>
                    <td class="bar">
                      <i style=${{ "--part": `${(100 * Math.abs(x)) / most}%` }}></i>
                    </td>
                  </tr>`,
              )}
            </table>`
          : html`<p class="hint">The server told no pushes of this token.</p>`
      }
      <dl>
        ${
          token.logprob !== null &&
          html`<div>
            <dt>probability</dt>
            <dd>${percent(token.logprob)}</dd>
          </div>`
        }
        ${
          token.kl !== null &&
          html`<div>
            <dt>divergence here</dt>
            <dd>${token.kl.toFixed(2)} nats</dd>
          </div>`
        }
        ${
          token.count > 1 &&
          html`<div>
            <dt>tokens</dt>
            <dd>${token.count}</dd>
          </div>`
        }
      </dl>
    </div>
  `;
}
