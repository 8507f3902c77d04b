// How the server is spoken to: requests, streams of events, and what can go wrong with them.

import { createParser } from "eventsource-parser";

const KEPT = "crossfade-key"; // the name under which a tab keeps the key, if it is asked to
const STREAMS = 4; // at once: a browser has six connections to a server, and faders need some
const TRIES = 5; // how often a full server is asked

/** The server refused, in OpenAI's form. */
export class Refusal extends Error {
  constructor(status, error, retryAfter = null) {
    super(error?.message || `The server answered with status ${status}.`);
    Object.assign(this, { status, param: error?.param ?? null, retryAfter });
  }
}

/** There was no answer, or it broke off. */
export class Unreachable extends Error {}

let key = "";
try {
  key = sessionStorage.getItem(KEPT) ?? "";
} catch {
  // A browser that keeps nothing has no key yet.
}

export const hasKey = () => key !== "";

/** Use this key from now on, and keep it until the tab is closed if asked to. */
export function setKey(text, keep) {
  key = text;
  try {
    sessionStorage.removeItem(KEPT);
    if (keep) sessionStorage.setItem(KEPT, text);
  } catch {
    // Then it is known until the page is left.
  }
}

async function send(path, { body, signal } = {}) {
  const headers = {};
  if (body) headers["Content-Type"] = "application/json";
  if (key) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, {
      method: body ? "POST" : "GET",
      headers,
      body: body && JSON.stringify(body),
      signal,
      cache: "no-store",
    });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new Unreachable("The server cannot be reached.");
  }
  if (response.ok) return response;
  const said = await response.json().catch(() => null);
  const seconds = Number(response.headers.get("Retry-After") ?? NaN);
  throw new Refusal(response.status, said?.error, Number.isFinite(seconds) ? seconds : null);
}

/** What the server has: its terms, values, formula and limits. */
export async function getDesk() {
  const response = await send("v1/desk");
  return response.json().catch(() => {
    throw new Unreachable("What answers at this address is no server of crossfade.");
  });
}

/** Move faders of a request that is being written; what the server says of its moves. */
export async function setWeights(id, weights) {
  const path = `v1/requests/${encodeURIComponent(id)}/weights`;
  const response = await send(path, { body: { weights } });
  return response.json().catch(() => ({}));
}

export const cancel = (id) => send(`v1/requests/${encodeURIComponent(id)}/cancel`, { body: {} });

/** The chunks of a streamed request. An error within the stream is thrown as a refusal. */
async function* chunks(path, body, signal) {
  const response = await send(path, { body: { ...body, stream: true }, signal });
  const events = [];
  const parser = createParser({ onEvent: (event) => events.push(event.data) });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read().catch((error) => {
        if (signal.aborted) throw error;
        throw new Unreachable("The connection was lost before the text ended.");
      });
      if (done) throw new Unreachable("The connection ended before the text did.");
      parser.feed(value);
      for (const data of events.splice(0)) {
        if (data === "[DONE]") return;
        const chunk = parsed(data);
        if (chunk.error) throw new Refusal(response.status, chunk.error);
        yield chunk;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function parsed(data) {
  try {
    return Object(JSON.parse(data));
  } catch {
    throw new Refusal(200, { message: "The server sent an event that is no JSON." });
  }
}

let free = STREAMS;
const waiting = [];

async function enter() {
  if (free > 0) free--;
  else await new Promise((resolve) => waiting.push(resolve));
}

function leave() {
  const next = waiting.shift();
  if (next) next();
  else free++;
}

/**
 * The chunks of a streamed request, which waits for a free connection, and asks again while the
 * server is full.
 *
 * @param {(seconds: number) => void} onFull called before it waits to ask again.
 */
export async function* stream(path, body, signal, onFull) {
  await enter();
  try {
    for (let tries = 1; ; tries++) {
      try {
        yield* chunks(path, body, signal);
        return;
      } catch (error) {
        if (error.status !== 429 || tries === TRIES) throw error;
        const seconds = Math.min(error.retryAfter ?? 2 ** (tries - 1), 60);
        onFull(seconds);
        await sleep(1000 * seconds, signal);
      }
    }
  } finally {
    leave();
  }
}

/** Wait; raises what `fetch` would raise if the signal aborts meanwhile. */
export function sleep(milliseconds, signal) {
  return new Promise((resolve, reject) => {
    const stop = () => reject(signal.reason);
    if (signal?.aborted) return stop();
    setTimeout(() => {
      signal?.removeEventListener("abort", stop);
      resolve();
    }, milliseconds);
    signal?.addEventListener("abort", stop, { once: true });
  });
}
