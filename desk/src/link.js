// Settings as the part of an address after its "#", which whoever is sent a link opens.
// It never holds a key. What it holds comes from anybody, so each part is checked.

const LONGEST = 4000; // characters a text in a link may have
const STRIP = /^([^:,]{1,64}):(-?\d{1,6}(?:\.\d{1,6})?)(m?)(s?)$/u;

const NUMBERS = {
  temperature: [0, 10],
  top_p: [0.001, 1],
  max_tokens: [1, 1e6],
  seed: [0, 2 ** 53 - 1],
};
const WHOLE = ["max_tokens", "seed"];
const TEXTS = ["prompt", "system", "blend"];

/** @param {object} set `settings` of texts and numbers, `systems` by term, `strips` as below. */
export function toHash({ settings, systems, strips }) {
  const found = new URLSearchParams();
  for (const name of TEXTS) if (settings[name]) found.set(name, settings[name]);
  for (const [term, text] of Object.entries(systems)) if (text) found.set(`system.${term}`, text);
  if (!settings.chat) found.set("chat", "0");
  for (const name of Object.keys(NUMBERS)) found.set(name, String(settings[name]));
  for (const { weights, muted, soloed } of strips) {
    const each = Object.entries(weights).map(([name, x]) => {
      const switches = (muted.has(name) ? "m" : "") + (soloed.has(name) ? "s" : "");
      return `${name}:${Number(x.toFixed(6))}${switches}`;
    });
    found.append("strip", each.join(","));
  }
  return `#${found}`;
}

/** The settings of a hash that can be read: `{settings, systems, strips}`, whose parts may lack. */
export function fromHash(hash) {
  const found = new URLSearchParams(hash.replace(/^#/, ""));
  const [settings, systems] = [{}, {}];
  for (const name of TEXTS) {
    if (found.has(name)) settings[name] = found.get(name).slice(0, LONGEST);
  }
  for (const [name, [low, high]] of Object.entries(NUMBERS)) {
    const x = found.get(name)?.trim() ? Number(found.get(name)) : NaN;
    const fits = x >= low && x <= high && (Number.isInteger(x) || !WHOLE.includes(name));
    if (fits) settings[name] = x;
  }
  if (found.has("chat")) settings.chat = found.get("chat") !== "0";
  for (const [name, text] of found) {
    if (name.startsWith("system.")) systems[name.slice(7)] = text.slice(0, LONGEST);
  }
  return { settings, systems, strips: found.getAll("strip").map(strip) };
}

function strip(text) {
  const found = { weights: {}, muted: new Set(), soloed: new Set() };
  for (const part of text.split(",")) {
    const match = STRIP.exec(part);
    if (!match) continue;
    found.weights[match[1]] = Number(match[2]);
    if (match[3]) found.muted.add(match[1]);
    if (match[4]) found.soloed.add(match[1]);
  }
  return found;
}
