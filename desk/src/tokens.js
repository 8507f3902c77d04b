// Tokens as they are shown: what was written, and which fader moved it how far from the base.

/**
 * The tokens of a chunk of a stream.
 *
 * A token has its text, how many of the model's tokens it stands for, its log-prob, its pushes by
 * fader in nats, and the divergence from the base where it was written. Where the texts of the
 * single tokens do not make up the chunk's text, as with a letter of several tokens, the chunk is
 * one token: log-probs and pushes of tokens in a row add up.
 *
 * @param {object} choice the chunk's choice, of either of OpenAI's endpoints.
 */
export function tokensOf(choice) {
  const text = choice.delta?.content ?? choice.text ?? "";
  const each = single(choice);
  if (each.length && each.map((token) => token.text).join("") === text) return each;
  if (!text && !each.length) return [];
  const sum = (numbers) => numbers.reduce((a, b) => (b === null ? a : (a ?? 0) + b), null);
  const pushes = {};
  for (const token of each) {
    for (const [name, x] of Object.entries(token.pushes)) pushes[name] = (pushes[name] ?? 0) + x;
  }
  const [logprob, kl] = ["logprob", "kl"].map((name) => sum(each.map((token) => token[name])));
  return [{ text, count: Math.max(each.length, 1), logprob, pushes, kl }];
}

/** The single tokens of a choice: OpenAI's log-probs, and what crossfade adds to them. */
function single({ logprobs, pushes, kl_to_base: kl }) {
  const texts = logprobs?.content?.map((token) => token.token) ?? logprobs?.tokens ?? [];
  const numbers = logprobs?.content?.map((token) => token.logprob) ?? logprobs?.token_logprobs;
  return texts.map((text, i) => ({
    text,
    count: 1,
    logprob: numbers[i],
    pushes: pushes?.[i] ?? {},
    kl: kl?.[i] ?? null,
  }));
}

/** The fader that moved a token most away from the base, `{name, nats}`; null where none did. */
export function strongest(token) {
  let found = null;
  for (const [name, nats] of Object.entries(token.pushes)) {
    if (Number.isFinite(nats) && Math.abs(nats) > Math.abs(found?.nats ?? 0))
      found = { name, nats };
  }
  return found;
}

const STEPS = [0.1, 0.3, 0.6, 1.2, 2.4]; // nats from which a colour has strength 1 to 5

/** How strong the colour of a push is, from 0 to 5. */
export function strength(nats) {
  return STEPS.filter((step) => Math.abs(nats) >= step).length;
}

/** How hard a fader pushed the last few tokens, in nats a token: what its meter shows. */
export function recently(tokens, fader, last = 8) {
  const few = tokens.slice(-last);
  if (!few.length) return 0;
  return few.reduce((sum, token) => sum + Math.abs(token.pushes[fader] ?? 0), 0) / few.length;
}
