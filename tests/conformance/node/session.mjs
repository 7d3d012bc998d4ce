// What the calls of one run share: clients, an owner of their own, what earlier calls made. Needs `openai` alone.

import { randomBytes } from 'node:crypto';
import { isDeepStrictEqual } from 'node:util';
import OpenAI from 'openai';

export const TIMEOUT_MS = 120_000;
export const QUESTION = 'Which colour has the sky?';
const WORDS = ['rain', 'sun', 'fox', 'dog', 'cafe', 'green', 'blue', 'left', 'right', 'weather', 'yes', 'no'];

/** What the server did is not what an `openai` user may expect. */
export class Unmet extends Error {}

/** The client has no such call, or the settings of the server do not allow what it needs. */
export class Lacking extends Error {}

/** One owner on a running server. Calls run in order and find here what earlier ones made. */
export class Session {
  constructor(fields) {
    Object.assign(this, fields);
    this.made = {};
  }

  /** A session of a new owner. `apiKey` is an admin's; `base` is the first one that is served unless given. */
  static async open(baseURL, apiKey, base) {
    const began = Math.floor(Date.now() / 1000);
    const admin = new OpenAI({ baseURL, apiKey, timeout: TIMEOUT_MS });
    const served = (await collect(admin.models.list())).filter((model) => model.owned_by === 'tuneloom');
    const chosen = served.find((model) => model.id === (base ?? model.root));
    if (!chosen) throw new Unmet(`the server has no base \`${base}\`; it has ${served.map((model) => model.id)}`);
    const owner = `conformance-${randomBytes(4).toString('hex')}`;
    const body = { name: 'conformance', owner, scopes: ['inference', 'training'] };
    const { secret: key } = await admin.post('/tuneloom/keys', { body });
    const client = new OpenAI({ baseURL, apiKey: key, timeout: TIMEOUT_MS });
    const [first, second] = await letters(client, chosen.id);
    const always = { [first.id]: 100 };
    const either = { [first.id]: 100, [second.id]: 100 };
    const contextLength = chosen.max_model_len;
    const found = { base: chosen.id, contextLength, first, second, always, either };
    return new Session({ baseURL, key, owner, client, admin, began, ...found });
  }

  /** What an earlier call has left under `name`. */
  earlier(name) {
    if (!(name in this.made)) throw new Unmet(`an earlier call did not leave \`${name}\``);
    return this.made[name];
  }

  /** A new key of `owner`, as the admin API shows it. */
  mint(owner, ...scopes) {
    return this.admin.post('/tuneloom/keys', { body: { name: 'conformance', owner, scopes } });
  }

  clientWith(key, baseURL = this.baseURL) {
    return new OpenAI({ baseURL, apiKey: key, timeout: TIMEOUT_MS, maxRetries: 0 });
  }

  /** A short greedy answer. */
  ask(options = {}, content = QUESTION) {
    return this.client.chat.completions.create({
      model: this.base,
      messages: user(content),
      temperature: 0,
      max_completion_tokens: 8,
      ...options,
    });
  }

  /** Remove what the run has made; what is left stays with its owner, whom nobody else sees. */
  async cleanUp() {
    for (const job of await collect(this.client.fineTuning.jobs.list({ limit: 100 })))
      if (!['succeeded', 'failed', 'cancelled'].includes(job.status)) await this.client.fineTuning.jobs.cancel(job.id);
    for (const file of await collect(this.client.files.list())) await this.client.files.delete(file.id);
    const keys = await this.admin.get('/tuneloom/keys', { query: { owner: this.owner } });
    for (const key of keys.data) await this.admin.delete(`/tuneloom/keys/${key.id}`);
  }
}

/** Two tokens of the model's vocabulary that are one letter each, found by letting the server echo token ids. */
async function letters(client, model) {
  const ids = Array.from({ length: 117 }, (_, i) => i + 3);
  const prompt = ids.map((id) => [id, id]);
  const answer = await client.completions.create({ model, prompt, echo: true, max_tokens: 1, temperature: 0 });
  const found = ids
    .map((id, i) => ({ id, text: answer.choices[i].text[0], echoed: answer.choices[i].text }))
    .filter(({ text, echoed }) => /^[a-z]$/i.test(text ?? '') && echoed.startsWith(text + text));
  if (found.length < 2) throw new Unmet(`no two tokens of ${ids[0]}-${ids.at(-1)} are letters`);
  return found;
}

export const user = (content) => [{ role: 'user', content }];

/** Training rows that even a tiny model learns something from. */
export function rows(count, answer = 'serious') {
  const lines = Array.from({ length: count }, (_, i) => {
    const word = WORDS[i % WORDS.length];
    return JSON.stringify({
      messages: [...user(`${word} ${i}`), { role: 'assistant', content: `${answer} ${word}` }],
    });
  });
  return Buffer.from(lines.join('\n') + '\n');
}

/** Everything that a list gives, over all its pages. */
export async function collect(list) {
  const items = [];
  for await (const item of list) items.push(item);
  return items;
}

const show = (value) => {
  const text = JSON.stringify(value) ?? String(value);
  return text.length > 300 ? text.slice(0, 300) + '...' : text;
};

export function same(what, actual, expected) {
  if (!isDeepStrictEqual(actual, expected)) throw new Unmet(`${what}: got ${show(actual)}, expected ${show(expected)}`);
}

/** `isSo` or not at all; `seen` is what to show then. */
export function holds(what, isSo, seen) {
  if (!isSo) throw new Unmet(`${what}: got ${show(seen)}`);
}

/** The error that `call` raises; its attributes are as `expected`, or it is not the right one. */
export async function fails(kind, call, expected = {}) {
  let result;
  try {
    result = await call();
  } catch (error) {
    if (!(error instanceof kind)) throw error;
    for (const [name, value] of Object.entries(expected)) same(`${kind.name}.${name}`, error[name], value);
    return error;
  }
  throw new Unmet(`no ${kind.name}; it answered ${show(result)}`);
}

/** The first true value of `check`. */
export async function waitFor(what, check, timeoutMs, everyMs = 500) {
  const deadline = Date.now() + timeoutMs;
  for (;;) {
    const value = await check();
    if (value) return value;
    if (Date.now() > deadline) throw new Unmet(`${what}: not within ${timeoutMs / 1000} s`);
    await new Promise((resolve) => setTimeout(resolve, everyMs));
  }
}

export const answerOf = (answer) => answer.choices[0].message.content;
export const textOf = (chunks) => chunks.map((chunk) => chunk.choices[0]?.delta?.content ?? '').join('');
export const distinct = (values) => new Set(values).size;
export const sorted = (values, sign = 1) => [...values].sort((a, b) => sign * (a - b));
