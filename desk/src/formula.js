// What a formula's text says: its names, its faders and what each of them moves.
// Only the server evaluates formulas; see crossfade/formula.py, whose spelling this follows.

const PIECE = new RegExp(
  [
    /\s+/, // spaces
    /"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'/, // texts
    /(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?/, // numbers
    /[\p{L}_][\p{L}\p{N}_]*/u, // names
    /[\s\S]/, // signs
  ]
    .map((kind) => kind.source)
    .join("|"),
  "gu",
);
const NAME = /^[\p{L}_]/u;
const CLOSING = { ")": "(", "]": "[" };

/** The pieces of a formula that are no spaces, each with the place of its first character. */
function pieces(formula) {
  const found = [];
  for (const match of formula.matchAll(PIECE)) {
    if (match[0].trim()) found.push({ text: match[0], at: match.index });
  }
  return found;
}

/** Whether piece i names a model, a value or a fader, and no function, attribute or keyword. */
function isFree(found, i) {
  const [before, after] = [found[i - 1]?.text, found[i + 1]?.text];
  return NAME.test(found[i].text) && before !== "." && after !== "(" && after !== "=";
}

/** The names that a formula has, in its order, each once. */
export function names(formula) {
  const found = pieces(formula);
  return [...new Set(found.filter((_, i) => isFree(found, i)).map((piece) => piece.text))];
}

/** The faders of a formula: its names that are none of those known, of models and values. */
export function faders(formula, known) {
  return names(formula).filter((name) => !known.includes(name) && name !== "inf");
}

/** What is wrong with a formula that a glance shows, or "". The server finds the rest. */
export function problem(formula) {
  if (!formula.trim()) return "The formula is empty.";
  const open = [];
  for (const { text } of pieces(formula)) {
    if ("([".includes(text)) open.push(text);
    if (text in CLOSING && open.pop() !== CLOSING[text]) return `A ${text} is too many.`;
  }
  return open.length ? `A ${open.at(-1)} is not closed.` : "";
}

/** The place after the parenthesis that closes the one at place i. */
function closed(found, i) {
  let depth = 0;
  for (let k = i; k < found.length; k++) {
    if (found[k].text === "(") depth++;
    if (found[k].text === ")" && --depth === 0) return k + 1;
  }
  return found.length;
}

/** The number of pieces from i on that make one operand: a name, a call or a parenthesis. */
function operandLength(found, i) {
  let j = i;
  if (found[j] && NAME.test(found[j].text)) j++;
  else if (found[j]?.text !== "(") return 0;
  if (found[j]?.text === "(") j = closed(found, j);
  while (found[j]?.text === "." && found[j + 2]?.text === "(") j = closed(found, j + 2);
  return j - i;
}

/** What a fader multiplies, for people: "kind − base" in `base + w * (kind - base)`; or "". */
export function moved(formula, fader) {
  const found = pieces(formula);
  for (let i = 0; i < found.length; i++) {
    if (found[i].text !== fader || !isFree(found, i)) continue;
    let [first, count] = [0, 0];
    if (found[i + 1]?.text === "*") {
      first = i + 2;
      count = operandLength(found, first);
    } else if (found[i - 1]?.text === "*") {
      // The operand before it begins at the first piece from which one reaches just up to the "*".
      first = found.findIndex((_, k) => k < i && k + operandLength(found, k) === i - 1);
      count = first < 0 ? 0 : i - 1 - first;
    }
    if (!count) continue;
    const last = found[first + count - 1];
    const text = formula.slice(found[first].at, last.at + last.text.length);
    const whole = found[first].text === "(" && closed(found, first) === first + count;
    return (whole ? text.slice(1, -1) : text).trim().replace(/\s+/g, " ").replace(/ - /g, " − ");
  }
  return "";
}

/** The formula with numbers in place of its faders. */
export function filled(formula, weights) {
  const found = pieces(formula);
  let [text, end] = ["", 0];
  found.forEach((piece, i) => {
    if (!isFree(found, i) || !(piece.text in weights)) return;
    const x = weights[piece.text];
    text += formula.slice(end, piece.at) + (x < 0 ? `(${x})` : String(x));
    end = piece.at + piece.text.length;
  });
  return text + formula.slice(end);
}

/** A formula in which each model but the first, and each value, has a fader of its own. */
export function oneFaderEach(terms, values) {
  const taken = new Set([...terms, ...values]);
  const fader = (name) => {
    let found = `w_${name}`;
    while (taken.has(found)) found += "_";
    return found;
  };
  const [base, ...others] = terms;
  return [
    base,
    ...others.map((name) => `${fader(name)} * (${name} - ${base})`),
    ...values.map((name) => `${fader(name)} * ${name}`),
  ].join(" + ");
}
