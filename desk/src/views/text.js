// The text of a strip: each token in the colour of the fader that moved it most.

import { html } from "htm/preact";
import { useEffect, useRef } from "preact/hooks";
import * as desk from "../desk.js";
import { strength, strongest } from "../tokens.js";
import { closeTip, showTip, tip } from "./tip.js";

const BLOCK = 64; // tokens that are drawn at once

export function Text({ strip, take }) {
  const box = useRef();
  const full = useRef(new Map());
  const shown = tip.value?.take === take ? tip.value : null;
  useEffect(() => {
    const token = shown && box.current?.querySelector(`[data-at="${shown.at}"]`);
    token?.classList.add("current");
    return () => token?.classList.remove("current");
  }, [shown]);
  if (!take) {
    return html`<p class="text empty">
      Nothing yet. Press <b>Write</b>, then move a fader while the text comes.
    </p>`;
  }
  take.version.value; // It is drawn anew when tokens have come.
  const at = (event) => Number(event.target.closest?.("[data-at]")?.dataset.at ?? -1);
  const show = (i, how) => showTip({ strip, take, at: i, how, box: box.current });
  const onPointer = (event) => {
    if (event.pointerType !== "mouse" || tip.value?.how === "tap") return;
    if (at(event) >= 0) show(at(event), "hover");
    else if (tip.value?.how === "hover") closeTip();
  };
  const onClick = (event) => {
    const i = at(event);
    if (i < 0 || (shown?.how === "tap" && shown.at === i)) closeTip();
    else show(i, "tap");
  };
  const onKeyDown = (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    const ends = { Home: [-1, 1], End: [take.tokens.length, -1] }[event.key];
    if ((!step && !ends) || event.ctrlKey || event.metaKey || event.altKey) return;
    const [from, by] = ends ?? [shown?.at ?? (step > 0 ? -1 : take.tokens.length), step];
    let i = from + by;
    while (take.tokens[i] && !take.tokens[i].text) i += by; // A token may have no text of its own.
    if (!take.tokens[i]) return;
    event.preventDefault();
    show(i, "keys");
  };
  return html`
    <div
      ref=${box}
      class="text"
      tabindex="0"
      role="group"
      aria-label=${`Text of strip ${strip.name}; arrow keys go from word to word`}
      onPointerOver=${onPointer}
      onPointerLeave=${() => tip.value?.how === "hover" && closeTip()}
      onClick=${onClick}
      onKeyDown=${onKeyDown}
      onBlur=${() => tip.value?.how === "keys" && closeTip()}
    >
      ${blocks(take, full.current)}${take.active && html`<i class="caret"></i>`}
    </div>
  `;
}

/**
 * The tokens in blocks, with the places where faders were moved. What is full is drawn once, while
 * its colours are the same, so that a long text costs no more than a short one as it grows.
 */
function blocks(take, full) {
  const hues = desk.channels.value;
  const found = [];
  for (let first = 0; first < take.tokens.length; first += BLOCK) {
    const end = Math.min(first + BLOCK, take.tokens.length);
    const old = full.get(first);
    const same =
      old?.take === take && old.hues === hues && old.moved === take.moved && old.end === end;
    if (!same)
      full.set(first, { take, hues, moved: take.moved, end, drawn: block(take, first, end) });
    found.push(full.get(first).drawn);
  }
  return found;
}

function block({ tokens, moves }, first, end) {
  const found = [];
  const from = first > 0 ? tokens[first].start : -1; // What was moved at a block's end is its own.
  const to = end < tokens.length ? tokens[end].start : Infinity;
  const inside = moves.filter(({ at }) => at >= from && at < to);
  for (let i = first; i < end; i++) {
    while (inside.length && inside[0].at <= tokens[i].start) found.push(moved(inside.shift()));
    found.push(drawn(tokens[i], i));
  }
  return html`<span key=${first}>${[...found, ...inside.map(moved)]}</span>`;
}

/** One token. The space before a word has no colour, since it may hang at the end of a line. */
function drawn(token, i) {
  const push = strongest(token);
  const strong = push ? strength(push.nats) : 0;
  if (!strong) return html`<span key=${i} data-at=${i}>${token.text}</span>`;
  const kind = `${desk.colour(push.name)} s${strong}${push.nats < 0 ? " against" : ""}`;
  const word = token.text.trimStart();
  const space = token.text.slice(0, token.text.length - word.length);
  return html`<span key=${i} data-at=${i}>${space}<span class=${kind}>${word}</span></span>`;
}

function moved({ at, changed }) {
  return html`<span key=${`moved-${at}`} class="moved" aria-hidden="true">
    ${Object.entries(changed).map(
      ([name, x]) => html`<b class=${desk.colour(name)} data-moved=${`${name} ${x}`}></b>`,
    )}
  </span>`;
}
