// How the page stands with the server: a word in the header, a banner if it is bad, and the key.

import { useSignal } from "@preact/signals";
import { html } from "htm/preact";
import { useEffect, useRef } from "preact/hooks";
import * as api from "../api.js";
import * as desk from "../desk.js";

const WORDS = {
  loading: "asking the server…",
  ready: "connected",
  locked: "a key is needed",
  lost: "no connection",
  failed: "the server refuses",
};

export function Connection() {
  const state = desk.connection.value;
  const version = desk.server.value?.version;
  const bad = state === "lost" || state === "failed";
  return html`
    <p class="connection ${state}">
      ${WORDS[state]}
      ${state === "ready" && version && html`<span class="version"> · version ${version}</span>`}
    </p>
    ${
      bad &&
      html`<div class="banner" role="alert">
        <span>${desk.trouble}</span>
        <button type="button" onClick=${desk.connect}>Try now</button>
      </div>`
    }
    ${state === "locked" && html`<${Key} />`}
  `;
}

/** The dialog that asks for the key. */
function Key() {
  const [dialog, input, keep] = [useRef(), useRef(), useRef()];
  const problem = useSignal(desk.trouble.value);
  useEffect(() => dialog.current.showModal(), []);
  const submit = (event) => {
    event.preventDefault();
    const text = input.current.value.trim();
    if (!/^[\x21-\x7e]+$/.test(text)) {
      problem.value = "A key has letters, digits and signs of ASCII, and no spaces.";
      return;
    }
    api.setKey(text, keep.current.checked);
    desk.connection.value = "loading";
    desk.connect();
  };
  return html`
    <dialog ref=${dialog} aria-labelledby="key-title" onCancel=${(event) => event.preventDefault()}>
      <form onSubmit=${submit}>
        <h2 id="key-title">This server asks for a key</h2>
        <p>Whoever started it has the key: it is what <code>--api-key</code> was given.</p>
        <label class="field">
          <span>Key</span>
          <input ref=${input} type="password" autocomplete="off" spellcheck=${false} required />
        </label>
        <label class="check">
          <input ref=${keep} type="checkbox" /> Keep it until this tab is closed
        </label>
        ${problem.value && html`<p class="problem" role="alert">${problem}</p>`}
        <button type="submit" class="main">Use this key</button>
      </form>
    </dialog>
  `;
}
