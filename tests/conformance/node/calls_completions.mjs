// Calls of `completions` on a base.

import { collect, distinct, holds, same } from './session.mjs';

const PROMPT = 'The quick brown fox';
const OTHER = 'Rain and sun';
const complete = (session, options = {}) =>
  session.client.completions.create({ model: session.base, prompt: PROMPT, max_tokens: 8, temperature: 0, ...options });
const streamed = async (session, options = {}) => collect(await complete(session, { ...options, stream: true }));
const textOf = (chunks) => chunks.map((chunk) => chunk.choices[0]?.text ?? '').join('');
const textsOf = (answer) => answer.choices.map((choice) => choice.text);

export async function completions_text(session) {
  const answer = await complete(session);
  holds('id', answer.id.startsWith('cmpl-'), answer.id);
  same('object and model', [answer.object, answer.model], ['text_completion', session.base]);
  const choice = answer.choices[0];
  same('choice', [answer.choices.length, choice.index, choice.logprobs], [1, 0, null]);
  same('text is a', typeof choice.text, 'string');
  holds('finish_reason', ['stop', 'length'].includes(choice.finish_reason), choice.finish_reason);
  const { prompt_tokens, completion_tokens, total_tokens } = answer.usage;
  holds('token counts', prompt_tokens > 0 && completion_tokens > 0 && completion_tokens <= 8, answer.usage);
  same('total_tokens', total_tokens, prompt_tokens + completion_tokens);
}

export async function completions_list(session) {
  const both = await complete(session, { prompt: [PROMPT, OTHER] });
  same('indices', both.choices.map((choice) => choice.index), [0, 1]);
  const each = [await complete(session, { prompt: PROMPT }), await complete(session, { prompt: OTHER })];
  same('texts', textsOf(both), each.flatMap(textsOf));
  same('prompt tokens', both.usage.prompt_tokens, each[0].usage.prompt_tokens + each[1].usage.prompt_tokens);
}

export async function completions_tokens(session) {
  const ids = Array(3).fill(session.first.id);
  const one = await complete(session, { prompt: ids, echo: true });
  same('prompt tokens', one.usage.prompt_tokens, 3);
  holds('the text of the ids', one.choices[0].text.startsWith(session.first.text.repeat(3)), one.choices[0].text);
  const several = await complete(session, { prompt: [ids, ids.slice(1)] });
  same('choices and prompt tokens', [several.choices.length, several.usage.prompt_tokens], [2, 5]);
}

export async function completions_stream(session) {
  const chunks = await streamed(session);
  same('id on every chunk', distinct(chunks.map((chunk) => chunk.id)), 1);
  same('object', chunks[0].object, 'text_completion');
  same('text', textOf(chunks), (await complete(session)).choices[0].text);
  const reasons = chunks.map((chunk) => chunk.choices[0].finish_reason);
  holds('a finish reason, once and last', reasons.at(-1) && !reasons.slice(0, -1).some(Boolean), reasons);
}

export async function completions_stream_usage(session) {
  const chunks = await streamed(session, { stream_options: { include_usage: true } });
  const last = chunks.pop();
  holds('no usage before the end', chunks.every((chunk) => !chunk.usage));
  same('choices of the last chunk', last.choices, []);
  same('usage', last.usage.total_tokens, (await complete(session)).usage.total_tokens);
}

export async function completions_echo(session) {
  const bare = (await complete(session)).choices[0].text;
  same('text', (await complete(session, { echo: true })).choices[0].text, PROMPT + bare);
  same('streamed', textOf(await streamed(session, { echo: true })), PROMPT + bare);
}

export async function completions_logprobs(session) {
  const answer = await complete(session, { logprobs: 2, logit_bias: session.always, max_tokens: 3 });
  const { tokens, token_logprobs, top_logprobs, text_offset } = answer.choices[0].logprobs;
  const { text } = session.first;
  same('tokens', tokens, [text, text, text]);
  holds('values', token_logprobs.every((value) => typeof value === 'number' && value <= 0), token_logprobs);
  same('alternatives', top_logprobs.length, 3);
  for (const best of top_logprobs) {
    const count = Object.keys(best).length;
    holds('two, and the chosen one', count >= 2 && count <= 3 && text in best, best);
  }
  same('offsets', text_offset, [0, 1, 2]);
}

export async function completions_n(session) {
  const options = { prompt: [PROMPT, OTHER], n: 2, temperature: 1, seed: 3 };
  const answer = await complete(session, options);
  same('indices', answer.choices.map((choice) => choice.index), [0, 1, 2, 3]);
  same('texts of one seed', textsOf(await complete(session, options)), textsOf(answer));
}

export async function completions_max_tokens(session) {
  const answer = await complete(session, { max_tokens: undefined, logit_bias: session.always });
  same('text', answer.choices[0].text, session.first.text.repeat(16));
  same('finish_reason', answer.choices[0].finish_reason, 'length');
}

export async function completions_model_in_url(session) {
  const client = session.clientWith(session.key, `${session.baseURL}/${session.base}`);
  const request = { model: session.base, prompt: PROMPT, max_tokens: 8, temperature: 0 };
  same('text', textsOf(await client.completions.create(request)), textsOf(await complete(session)));
}
