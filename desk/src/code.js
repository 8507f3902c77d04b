// The code that writes what a strip writes: in Python, in a session, and with curl.

import { names } from "./formula.js";

// A JSON string is a Python string too.
const text = (x) => JSON.stringify(x);
const mapping = (x) =>
  `{${Object.entries(x)
    .map(([name, value]) => `${text(name)}: ${typeof value === "string" ? text(value) : value}`)
    .join(", ")}}`;

function chat(request) {
  const turns = request.messages.map(({ role, content }) => mapping({ role, content }));
  return `[${turns.join(", ")}]`;
}

/** The arguments of `cf.generate` and `session.submit` that say how to sample. */
function sampling(request) {
  const found = [`max_new_tokens=${request.max_tokens}`];
  if (request.temperature > 0) {
    found.push("do_sample=True", `temperature=${request.temperature}`);
    if (request.top_p < 1) found.push(`top_p=${request.top_p}`);
  }
  return [...found, `seed=${request.seed}`];
}

const call = (head, parts) => `${head}(\n${parts.map((part) => `    ${part},\n`).join("")})`;

/**
 * One call of `cf.generate`. Its models are variables of the terms' names.
 *
 * @param {object} request what is sent to the server.
 * @param {string[]} known the names of the server's terms and values.
 */
export function python(request, known) {
  const used = names(request.blend).filter((name) => known.includes(name));
  const systems = request.systems ?? {};
  const models = used.map((name) =>
    name in systems ? `${name}=replace(${name}, system=${text(systems[name])})` : `${name}=${name}`,
  );
  const faders = Object.entries(request.weights).map(([name, x]) => `${name}=${x}`);
  const blend = `cf.parse(${[text(request.blend), ...models, ...faders].join(", ")})`;
  const inputs = request.messages ? `[${chat(request)}]` : `[${text(request.prompt)}]`;
  const lines = ["import crossfade as cf"];
  if (Object.keys(systems).length) lines.unshift("from dataclasses import replace\n");
  lines.push("", call("out = cf.generate", [blend, inputs, ...sampling(request)]));
  return [...lines, "print(out.text[0])"].join("\n");
}

/** The same for a `cf.Session`, which streams and whose faders can be moved. */
export function session(request) {
  const parts = [
    request.messages ? chat(request) : text(request.prompt),
    `blend=${text(request.blend)}`,
    `weights=${mapping(request.weights)}`,
  ];
  if (request.systems) parts.push(`systems=${mapping(request.systems)}`);
  return [
    call("request = session.submit", [...parts, ...sampling(request)]),
    "for piece in request:",
    '    print(piece.text, end="")',
  ].join("\n");
}

/** The same with curl, which streams events. A key is taken from the environment. */
export function curl(request, address, needsKey) {
  const quoted = (x) => `'${x.replaceAll("'", `'\\''`)}'`;
  return [
    `curl -N ${quoted(address)}`,
    `-H 'Content-Type: application/json'`,
    ...(needsKey ? ['-H "Authorization: Bearer $CROSSFADE_API_KEY"'] : []),
    `-d ${quoted(JSON.stringify({ ...request, stream: true }))}`,
  ].join(" \\\n  ");
}
