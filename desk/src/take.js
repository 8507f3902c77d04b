// A take: one text that is written, from its request to its end. Strips and sweeps have takes.

import { signal } from "@preact/signals";
import * as api from "./api.js";
import { tokensOf } from "./tokens.js";

const PAUSE = 60; // milliseconds within which moves of faders become one request
const NEAR = 4; // tokens between two moves that are shown as one
const ASKED = ["return_pushes", "return_kl_to_base"]; // what the desk asks for if it can be had
const ENDS = {
  stop: "It ended by itself.",
  length: "It reached the limit of tokens.",
  cancelled: "Stopped.",
  timeout: "The server's time for a request was up.",
};

export class Take {
  /** "waiting" for a first token, "writing", "done", "stopped" or "failed". */
  state = signal("waiting");
  /** Why it waits, ended or failed. */
  note = signal("");
  /** Grows when tokens have come, at most once a frame. */
  version = signal(0);
  /** What came: see `tokensOf`. `start` is how many of the model's tokens came before a token. */
  tokens = [];
  /** Nats at each token of the model's, null where the server told none. */
  kl = [];
  /** The faders that were moved while it was written: `{at, changed}`, after how many tokens. */
  moves = [];
  /** How often faders were moved: `moves` has a new look each time. */
  moved = 0;
  /** The score of the text by the value that was asked for; null where there is none. */
  value = null;
  /** The field that the server refused, as it names it; null if it refused none. */
  refused = null;

  #stopper = new AbortController();
  #id = null;
  #started = 0;
  #latest = 0;
  #frame = 0;
  #timer = 0;
  #wanted = null;
  #posting = false;

  /**
   * @param {string} path the endpoint.
   * @param {object} body the request.
   * @param {(error: Error) => void} onTrouble told of each error but refusals of the text itself.
   */
  constructor(path, body, onTrouble) {
    this.path = path;
    // The form of OpenAI's chats has a truth value where that of its texts has a number.
    this.body = { ...body, logprobs: "messages" in body ? true : 0 };
    for (const name of ASKED) this.body[name] = true;
    this.weights = body.weights;
    this.onTrouble = onTrouble;
  }

  get active() {
    return this.state.value === "waiting" || this.state.value === "writing";
  }

  get text() {
    return this.tokens.map((token) => token.text).join("");
  }

  get count() {
    return this.kl.length;
  }

  /** The mean divergence from the base, in nats a token; null where the server told none. */
  get divergence() {
    const told = this.kl.filter((nats) => nats !== null);
    return told.length ? told.reduce((a, b) => a + b, 0) / told.length : null;
  }

  /** Tokens a second since the first one came; null before the second. */
  get rate() {
    const seconds = (this.#latest - this.#started) / 1000;
    return this.count > 1 && seconds > 0 ? (this.count - 1) / seconds : null;
  }

  /** Write the text. Ends when it is done, stopped or failed, and says so in `state` and `note`. */
  async write() {
    let reason = null;
    try {
      for await (const chunk of this.#chunks()) {
        this.#id ??= chunk.id ?? null;
        reason = this.#add(chunk) ?? reason;
        if (this.#wanted) this.#postSoon();
      }
      if (this.active) this.#end("done", ENDS[reason] ?? "");
    } catch (error) {
      if (!this.active) return; // It was stopped, which is how the stream broke off.
      this.refused = error.param ?? null;
      this.#end("failed", error.message);
      this.onTrouble(error);
    }
  }

  /** The chunks of the request, without what the server says it cannot tell of this formula. */
  async *#chunks() {
    for (;;) {
      try {
        yield* api.stream(this.path, this.body, this.#stopper.signal, (seconds) => {
          this.note.value = `The server is full; asking again in ${seconds} s.`;
        });
        return;
      } catch (error) {
        if (error.status !== 400 || !ASKED.includes(error.param) || !this.body[error.param]) {
          throw error;
        }
        this.body = { ...this.body };
        delete this.body[error.param];
      }
    }
  }

  /** Take what a chunk has; why the text ended, if it did. */
  #add(chunk) {
    const choice = chunk.choices?.[0];
    if (!choice) return null; // a chunk of usage
    const found = tokensOf(choice);
    if (found.length) {
      this.#latest = performance.now();
      if (!this.tokens.length) this.#started = this.#latest;
      let start = this.count;
      for (const token of found) {
        this.tokens.push({ ...token, start });
        start += token.count;
      }
      this.kl.push(
        ...(choice.kl_to_base ?? found.flatMap((token) => Array(token.count).fill(null))),
      );
      if (this.active) this.state.value = "writing";
      this.note.value = "";
      this.#changed();
    }
    this.value = choice.value ?? this.value;
    return choice.cut ?? choice.finish_reason;
  }

  #changed() {
    this.#frame ||= requestAnimationFrame(() => {
      this.#frame = 0;
      this.version.value++;
    });
  }

  #end(state, note) {
    clearTimeout(this.#timer);
    this.state.value = state;
    this.note.value = note;
    this.version.value++;
  }

  /** Stop it; what is written stays. */
  stop() {
    if (!this.active) return;
    this.#end("stopped", ENDS.cancelled);
    if (this.#id !== null) api.cancel(this.#id).catch(() => {}); // It may have just ended.
    this.#stopper.abort();
  }

  /** Move its faders, from the next token on. Moves that follow each other closely become one. */
  move(weights) {
    const own = Object.keys(this.weights).map((name) => [
      name,
      weights[name] ?? this.weights[name],
    ]);
    this.#wanted = Object.fromEntries(own);
    if (this.#id !== null) this.#postSoon();
  }

  #postSoon() {
    if (this.#posting) return;
    this.#posting = true;
    this.#timer = setTimeout(() => this.#post(), PAUSE);
  }

  async #post() {
    const weights = this.#wanted;
    this.#wanted = null;
    try {
      if (this.active && differ(weights, this.weights)) {
        this.#note(weights, await api.setWeights(this.#id, weights));
      }
    } catch (error) {
      // A text that has just ended has no faders any more.
      if (this.active && error.status !== 404) {
        this.note.value = `The faders could not be moved: ${error.message}`;
        this.onTrouble(error);
      }
    }
    this.#posting = false;
    if (this.#wanted && this.active) this.#postSoon();
  }

  /**
   * Remember a move. A fader that is drawn along makes many; those of a few tokens become one.
   *
   * @param {object} said the server's answer, which tells how many tokens had been written.
   */
  #note(weights, said) {
    const each = Object.entries(weights).filter(([name, x]) => x !== this.weights[name]);
    const changed = Object.fromEntries(each);
    const at = said.changes?.[0]?.at(-1)?.tokens ?? this.count;
    const last = this.moves.at(-1);
    if (last && at - last.latest <= NEAR) Object.assign(last.changed, changed);
    else this.moves.push({ at, changed });
    this.moves.at(-1).latest = at;
    this.moved++;
    this.weights = weights;
    this.#changed();
  }
}

function differ(a, b) {
  return Object.keys(a).some((name) => a[name] !== b[name]);
}
