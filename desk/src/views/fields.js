// Small fields that several views have.

import { useSignal } from "@preact/signals";
import { html } from "htm/preact";
import { useLayoutEffect, useRef } from "preact/hooks";

/**
 * A field for a number. What is typed counts at once if it is a number within the limits, and is
 * marked if not; the field shows the number that counts whenever nobody types into it.
 */
export function NumberInput({ value, onNumber, min = -Infinity, max = Infinity, step, ...others }) {
  const input = useRef();
  useLayoutEffect(() => {
    if (document.activeElement !== input.current) input.current.value = value;
  });
  const onInput = (event) => {
    const text = event.target.value.trim();
    const x = text === "" ? NaN : Number(text);
    const fits = Number.isFinite(x) && x >= min && x <= max && (step < 1 || Number.isInteger(x));
    event.target.setAttribute("aria-invalid", String(!fits));
    if (fits) onNumber(x);
  };
  const onBlur = (event) => {
    event.target.value = value;
    event.target.removeAttribute("aria-invalid");
  };
  return html`
    <input
      ref=${input}
      type="number"
      inputmode="decimal"
      min=${Number.isFinite(min) ? min : undefined}
      max=${Number.isFinite(max) ? max : undefined}
      step=${step}
      onInput=${onInput}
      onBlur=${onBlur}
      ...${others}
    />
  `;
}

/** A field for the number of a signal, with its label. */
export function NumberField({ label, value, ...limits }) {
  return html`
    <label class="field">
      <span>${label}</span>
      <${NumberInput} value=${value.value} onNumber=${(x) => (value.value = x)} ...${limits} />
    </label>
  `;
}

/** A button that copies a text, and says so for a while. */
export function CopyButton({ label, text }) {
  const shown = useSignal(label);
  const onClick = async () => {
    shown.value = (await copy(text())) ? "Copied" : "Select it and copy";
    setTimeout(() => (shown.value = label), 1500);
  };
  return html`<button type="button" class="quiet" onClick=${onClick}>${shown}</button>`;
}

/** Copy a text. Addresses without https may not use the clipboard, but may copy a selection. */
async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const area = document.createElement("textarea");
    area.className = "unseen";
    area.value = text;
    document.body.append(area);
    area.select();
    const copied = document.execCommand("copy");
    area.remove();
    return copied;
  }
}
