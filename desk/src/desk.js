// The state of the desk: what the server has, what is set, and the strips. Views read its signals.

import { batch, computed, effect, signal } from "@preact/signals";
import * as api from "./api.js";
import * as formula from "./formula.js";
import { fromHash, toHash } from "./link.js";
import { Take } from "./take.js";

export const STRIPS = 4; // at most, as many as `api.stream` serves at once
export const EXAMPLES = [
  "How was the weekend?",
  "How was the film?",
  "Describe a rainy walk.",
  "Why is the sky blue?",
];
const NAMES = "ABCD";
const AGAIN = 400; // milliseconds after the last move until a finished text is written anew

/** "loading", "ready", "locked" (a key is needed), "lost" (no answer) or "failed". */
export const connection = signal("loading");
export const trouble = signal(""); // what is wrong with the connection
export const server = signal(null); // what the server has, once it has told
export const said = signal(""); // what a screen reader says next

export const settings = {
  prompt: signal(""),
  system: signal(""),
  blend: signal(""),
  chat: signal(false),
  temperature: signal(0.7),
  top_p: signal(1),
  max_tokens: signal(120),
  seed: signal(7),
};
export const systems = signal({}); // system prompts by term
export const strips = signal([]);
export const follow = signal(true); // whether a moved fader writes a finished text anew

export const known = computed(() => [
  ...(server.value?.terms ?? []),
  ...(server.value?.values ?? []),
]);
export const faders = computed(() => formula.faders(settings.blend.value, known.value));

/** What colours stand for, in their order: faders or, in a formula without any, its other terms. */
export const channels = computed(() =>
  faders.value.length ? faders.value : formula.names(settings.blend.value).slice(1),
);

/** The class of a channel's colour. */
export function colour(name) {
  const i = channels.value.indexOf(name);
  return i < 0 ? "hue-none" : `hue-${i % 8}`;
}

/** A strip: positions of the faders, and the text that is written at them. */
export class Strip {
  weights = signal({});
  muted = signal(new Set());
  soloed = signal(new Set());
  take = signal(null);
  #timer = 0;

  constructor(name, { weights = {}, muted = new Set(), soloed = new Set() } = {}) {
    this.name = name;
    this.weights.value = weights;
    this.muted.value = muted;
    this.soloed.value = soloed;
  }

  position(fader) {
    return this.weights.value[fader] ?? server.value?.weights[fader] ?? 0;
  }

  /** Whether a fader counts: it is not muted, and soloed if any is. */
  sounds(fader) {
    const soloed = faders.value.some((name) => this.soloed.value.has(name));
    return !this.muted.value.has(fader) && (!soloed || this.soloed.value.has(fader));
  }

  /** The weights that are sent. A fader that does not count is at 0. */
  get sent() {
    return Object.fromEntries(
      faders.value.map((name) => [name, this.sounds(name) ? this.position(name) : 0]),
    );
  }

  move(fader, x) {
    this.weights.value = { ...this.weights.value, [fader]: x };
    this.#moved();
  }

  toggle(set, fader) {
    const found = new Set(this[set].value);
    if (!found.delete(fader)) found.add(fader);
    this[set].value = found;
    this.#moved();
  }

  #moved() {
    const take = this.take.value;
    clearTimeout(this.#timer);
    if (take?.active) take.move(this.sent);
    else if (take?.state.value === "done" && follow.value) {
      this.#timer = setTimeout(() => this.write(), AGAIN);
    }
  }

  /** Write the text anew. */
  async write() {
    clearTimeout(this.#timer);
    this.take.value?.stop();
    const take = begin(this.sent);
    this.take.value = take;
    await take.write();
    if (this.take.value !== take || take.state.value === "stopped") return;
    said.value = `Strip ${this.name}: ${take.count} tokens. ${take.note.value}`;
  }

  stop() {
    clearTimeout(this.#timer);
    this.take.value?.stop();
  }
}

/** The request that is sent for some positions of the faders. */
export function request(weights) {
  const { prompt, system, blend, chat, ...sampling } = settings;
  const found = { blend: blend.value, weights };
  if (chat.value) {
    found.messages = [{ role: "user", content: prompt.value }];
    if (system.value) found.messages.unshift({ role: "system", content: system.value });
    const own = Object.entries(systems.value).filter(
      ([term, text]) => text && server.value.terms.includes(term),
    );
    if (own.length) found.systems = Object.fromEntries(own);
  } else {
    found.prompt = prompt.value;
  }
  for (const [name, x] of Object.entries(sampling)) found[name] = x.value;
  return found;
}

export const path = () => (settings.chat.value ? "v1/chat/completions" : "v1/completions");

/** A take of what is set, at some positions of the faders; `others` are fields that differ. */
export function begin(weights, others = {}) {
  return new Take(path(), { ...request(weights), ...others }, (error) => {
    if (error instanceof api.Unreachable) reconnect();
    else if (error.status === 401) lock(error);
  });
}

export const writing = computed(() => strips.value.some((strip) => strip.take.value?.active));
export const problem = computed(() => {
  if (!settings.prompt.value.trim()) return "Write a prompt, or pick one.";
  return formula.problem(settings.blend.value);
});

export function writeAll() {
  if (connection.value !== "ready" || problem.value) return;
  said.value = strips.value.length === 1 ? "Writing." : `Writing ${strips.value.length} texts.`;
  for (const strip of strips.value) strip.write();
}

export function stopAll() {
  if (writing.value) said.value = "Stopped.";
  for (const strip of strips.value) strip.stop();
}

/** Add a strip, at the positions of the last one if none are given. */
export function addStrip(positions) {
  if (strips.value.length >= STRIPS) return;
  const taken = strips.value.map((strip) => strip.name);
  const last = strips.value.at(-1);
  const copied = {
    weights: { ...last?.weights.value },
    muted: new Set(last?.muted.value),
    soloed: new Set(last?.soloed.value),
  };
  const name = [...NAMES].find((letter) => !taken.includes(letter));
  strips.value = [...strips.value, new Strip(name, positions ?? copied)];
}

export function removeStrip(strip) {
  strip.stop();
  strips.value = strips.value.filter((other) => other !== strip);
}

let attempts = 0;
let timer = 0;

/** Ask the server what it has. */
export async function connect() {
  clearTimeout(timer);
  try {
    const found = await api.getDesk();
    if (found.needs_key && !api.hasKey()) return lock(null);
    attempts = 0;
    const first = server.value === null;
    batch(() => {
      server.value = { values: [], weights: {}, limits: {}, ...found };
      connection.value = "ready";
      if (first) setFromAddress();
    });
  } catch (error) {
    if (error instanceof api.Unreachable) return reconnect();
    if (error.status === 401) return lock(error);
    connection.value = "failed";
    trouble.value = error.message;
  }
}

function reconnect() {
  clearTimeout(timer);
  const seconds = Math.min(2 ** attempts++, 15);
  connection.value = "lost";
  trouble.value = "The server cannot be reached. Trying again.";
  timer = setTimeout(connect, 1000 * seconds);
}

function lock(error) {
  trouble.value = error && api.hasKey() ? error.message : "";
  connection.value = "locked";
}

/** Set what the address says, and what the server has by default for the rest. */
export function setFromAddress() {
  const found = fromHash(location.hash);
  const { terms, values, blend, limits, has_chat_template: chats } = server.value;
  const mixes = blend && formula.names(blend).length > 1;
  const defaults = {
    prompt: EXAMPLES[0],
    system: "",
    blend: mixes ? blend : formula.oneFaderEach(terms, values),
    chat: Boolean(chats),
    temperature: 0.7,
    top_p: 1,
    max_tokens: 120,
    seed: 7,
  };
  const set = { ...defaults, ...found.settings };
  if (!chats) set.chat = false;
  set.max_tokens = Math.min(set.max_tokens, limits.max_tokens ?? Infinity);
  batch(() => {
    for (const [name, x] of Object.entries(set)) settings[name].value = x;
    systems.value = found.systems;
    for (const strip of strips.value) strip.stop();
    const shown = found.strips.length ? found.strips.slice(0, STRIPS) : atFirst();
    strips.value = shown.map((positions, i) => new Strip(NAMES[i], positions));
  });
}

/** The first strips: one as the server has its faders, or with one of them up; one of the base. */
function atFirst() {
  const all = faders.value;
  if (!all.length) return [{}];
  const weights = Object.fromEntries(all.map((name) => [name, server.value.weights[name] ?? 0]));
  if (!all.some((name) => weights[name])) weights[all[0]] = 1;
  return [{ weights }, { weights: Object.fromEntries(all.map((name) => [name, 0])) }];
}

/** The address whose link shows what is set. */
export const address = computed(() => {
  const plain = Object.fromEntries(Object.entries(settings).map(([name, x]) => [name, x.value]));
  const shown = strips.value.map((strip) => ({
    weights: Object.fromEntries(faders.value.map((name) => [name, strip.position(name)])),
    muted: strip.muted.value,
    soloed: strip.soloed.value,
  }));
  return toHash({ settings: plain, systems: systems.value, strips: shown });
});

/** Begin: ask the server, and keep the address in step with what is set, and the other way. */
export function start() {
  let timer = 0;
  effect(() => {
    const hash = address.value;
    if (connection.value === "loading" || server.value === null) return;
    clearTimeout(timer);
    timer = setTimeout(() => history.replaceState(null, "", hash), 300);
  });
  addEventListener("hashchange", () => server.value && setFromAddress());
  connect();
}
