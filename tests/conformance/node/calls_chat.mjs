// Calls of `chat.completions` on a base.

import { answerOf, collect, distinct, holds, QUESTION, same, sorted, textOf, user } from './session.mjs';

const ABORTED_TOKENS = 300;
const TOGETHER = 8;
const streamed = async (session, options = {}) => collect(await session.ask({ ...options, stream: true }));

export async function chat_create(session) {
  const answer = await session.ask();
  holds('id', answer.id.startsWith('chatcmpl-'), answer.id);
  same('object and model', [answer.object, answer.model], ['chat.completion', session.base]);
  holds('created in seconds', Number.isInteger(answer.created) && answer.created > 1_700_000_000, answer.created);
  holds('system_fingerprint', answer.system_fingerprint.startsWith('fp_'), answer.system_fingerprint);
  same('choices', answer.choices.map((choice) => choice.index), [0]);
  const { message, finish_reason, logprobs } = answer.choices[0];
  same('message', [message.role, message.refusal, message.tool_calls], ['assistant', null, undefined]);
  same('content is a', typeof message.content, 'string');
  holds('finish_reason', ['stop', 'length'].includes(finish_reason), finish_reason);
  same('logprobs', logprobs, null);
  const { prompt_tokens, completion_tokens, total_tokens, prompt_tokens_details } = answer.usage;
  holds('token counts', prompt_tokens > 0 && completion_tokens > 0 && completion_tokens <= 8, answer.usage);
  same('total_tokens', total_tokens, prompt_tokens + completion_tokens);
  holds('cached_tokens', prompt_tokens_details.cached_tokens >= 0, answer.usage);
}

export async function chat_stream(session) {
  const chunks = await streamed(session);
  same('id, created and model on every chunk', distinct(chunks.map((c) => `${c.id} ${c.created} ${c.model}`)), 1);
  same('object', chunks[0].object, 'chat.completion.chunk');
  const [first, last] = [chunks[0].choices[0], chunks.at(-1).choices[0]];
  same('the first delta', [first.delta.role, first.delta.content], ['assistant', '']);
  same('the last delta', last.delta, {});
  holds('the last finish_reason', ['stop', 'length'].includes(last.finish_reason), last.finish_reason);
  holds('other finish reasons', chunks.slice(0, -1).every((chunk) => chunk.choices[0].finish_reason === null));
  holds('no usage where none was asked for', chunks.every((chunk) => !('usage' in chunk)));
  same('text', textOf(chunks), answerOf(await session.ask()));
}

export async function chat_stream_usage(session) {
  const chunks = await streamed(session, { stream_options: { include_usage: true } });
  const last = chunks.pop();
  holds('usage is null on each chunk', chunks.every((chunk) => chunk.usage === null));
  same('choices of the last chunk', last.choices, []);
  const counts = ({ prompt_tokens, completion_tokens, total_tokens }) => [prompt_tokens, completion_tokens, total_tokens];
  same('usage', counts(last.usage), counts((await session.ask()).usage));
}

export async function chat_stream_n(session) {
  const options = { n: 3, temperature: 1, seed: 5 };
  const [texts, reasons] = [['', '', ''], ['', '', '']];
  for (const { choices } of await streamed(session, options))
    for (const choice of choices) {
      texts[choice.index] += choice.delta.content ?? '';
      reasons[choice.index] += choice.finish_reason ?? '';
    }
  const whole = await session.ask(options);
  same('texts', texts, whole.choices.map((choice) => choice.message.content));
  same('finish reasons', reasons, whole.choices.map((choice) => choice.finish_reason));
}

export async function chat_stream_helper(session) {
  const { first, second } = session;
  const options = { logit_bias: session.either, frequency_penalty: 2, max_completion_tokens: 40 };
  const text = answerOf(await session.ask(options));
  const stop = text[0] === first.text ? second.text : first.text;
  const request = { model: session.base, messages: user(QUESTION), temperature: 0, stop, ...options };
  const seen = [];
  const stream = session.client.chat.completions.stream(request).on('chunk', (chunk) => seen.push(chunk.id));
  const answer = await stream.finalChatCompletion();
  holds('events', seen.length > 1 && distinct(seen) === 1, seen);
  same('finish_reason', answer.choices[0].finish_reason, 'stop');
  same('text', answerOf(answer), text.split(stop)[0]);
}

export async function chat_n(session) {
  const answer = await session.ask({ n: 4, temperature: 1.5, seed: 1, max_completion_tokens: 16 });
  same('indices', answer.choices.map((choice) => choice.index), [0, 1, 2, 3]);
  const texts = answer.choices.map((choice) => choice.message.content);
  holds('they are not all alike', distinct(texts) > 1, texts);
  holds('completion_tokens count all of them', answer.usage.completion_tokens > 16, answer.usage);
}

export async function chat_stop(session) {
  const options = { logit_bias: session.always, max_completion_tokens: 12 };
  const twice = session.first.text.repeat(2);
  for (const stop of [twice, ['never said', twice]]) {
    const choice = (await session.ask({ stop, ...options })).choices[0];
    same(`answer with stop ${stop}`, [choice.message.content, choice.finish_reason], ['', 'stop']);
  }
  const other = await session.ask({ stop: ['never said'], ...options });
  same('answer with a stop that never comes', other.choices[0].finish_reason, 'length');
  const chunks = await streamed(session, { stop: twice, ...options });
  same('streamed', [textOf(chunks), chunks.at(-1).choices[0].finish_reason], ['', 'stop']);
}

export async function chat_seed(session) {
  const sample = async (seed) => answerOf(await session.ask({ seed, temperature: 1.2, max_completion_tokens: 16 }));
  same('two answers of one seed', await sample(42), await sample(42));
  const texts = await Promise.all([0, 1, 2, 3].map(sample));
  holds('answers of four seeds differ', distinct(texts) > 1, texts);
}

export async function chat_temperature_zero(session) {
  const answers = [];
  for (const seed of [0, 1, 2]) answers.push(answerOf(await session.ask({ temperature: 0, seed })));
  same('different answers', distinct(answers), 1);
}

export async function chat_max_completion_tokens(session) {
  for (const name of ['max_completion_tokens', 'max_tokens']) {
    const answer = await session.ask({ max_completion_tokens: undefined, [name]: 7, logit_bias: session.always });
    same(`text with \`${name}\``, answerOf(answer), session.first.text.repeat(7));
    same('finish_reason', answer.choices[0].finish_reason, 'length');
    same('completion_tokens', answer.usage.completion_tokens, 7);
  }
}

export async function chat_logprobs(session) {
  const options = { logprobs: true, logit_bias: session.always, max_completion_tokens: 4 };
  checkLogprobs(session, (await session.ask({ ...options, top_logprobs: 3 })).choices[0].logprobs.content);
  const bare = (await session.ask(options)).choices[0].logprobs.content;
  same('alternatives without `top_logprobs`', bare.map((entry) => entry.top_logprobs), [[], [], [], []]);
}

export async function chat_stream_logprobs(session) {
  const options = { logprobs: true, top_logprobs: 3, logit_bias: session.always, max_completion_tokens: 4 };
  const chunks = await streamed(session, options);
  checkLogprobs(session, chunks.flatMap((chunk) => chunk.choices[0].logprobs?.content ?? []));
}

function checkLogprobs(session, entries) {
  const { text } = session.first;
  same('tokens', entries.map((entry) => entry.token), [text, text, text, text]);
  for (const entry of entries) {
    same('bytes', Buffer.from(entry.bytes).toString(), text);
    holds('logprob', typeof entry.logprob === 'number' && entry.logprob <= 0, entry.logprob);
    same('alternatives', entry.top_logprobs.length, 3);
    const values = entry.top_logprobs.map((other) => other.logprob);
    same('alternatives, best first', values, sorted(values, -1));
  }
}

export async function chat_logit_bias(session) {
  const { id, text } = session.first;
  const always = await session.ask({ logit_bias: session.always, max_completion_tokens: 5 });
  same('text', answerOf(always), text.repeat(5));
  const never = answerOf(await session.ask({ logit_bias: { [id]: -100 } }));
  holds('a token that never wins', !never.includes(text.repeat(2)), never);
}

export async function chat_penalties(session) {
  // Of two letters that are favoured alike, the one that comes first is soon outweighed by its own penalty.
  const { first, second } = session;
  const pair = await session.ask({ logit_bias: session.either, frequency_penalty: 2, max_completion_tokens: 40 });
  same('letters with `frequency_penalty`', new Set(answerOf(pair)), new Set([first.text, second.text]));
  const plain = await session.ask({ logit_bias: session.always, presence_penalty: 2, max_completion_tokens: 4 });
  same('a bias over `presence_penalty`', answerOf(plain), first.text.repeat(4));
  const greedy = answerOf(await session.ask());
  for (const seed of [0, 1, 2])
    same('a tiny `top_p` is greedy', answerOf(await session.ask({ top_p: 1e-6, temperature: 1.5, seed })), greedy);
}

export async function chat_content_parts(session) {
  const half = QUESTION.length / 2;
  const parts = [QUESTION.slice(0, half), QUESTION.slice(half)].map((text) => ({ type: 'text', text }));
  const [joined, whole] = [await session.ask({}, parts), await session.ask()];
  same('prompt tokens', joined.usage.prompt_tokens, whole.usage.prompt_tokens);
  same('text', answerOf(joined), answerOf(whole));
}

export async function chat_developer_role(session) {
  const withRole = (role, content) => session.ask({ messages: [{ role, content }, ...user(QUESTION)] });
  const brief = 'Answer with one word.';
  const [developer, system] = [await withRole('developer', brief), await withRole('system', brief)];
  same('prompt tokens', developer.usage.prompt_tokens, system.usage.prompt_tokens);
  same('text', answerOf(developer), answerOf(system));
  const longer = (await withRole('developer', brief.repeat(3))).usage.prompt_tokens;
  holds('it is part of the prompt', longer > developer.usage.prompt_tokens, longer);
}

export async function chat_conversation(session) {
  const first = await session.ask({ logit_bias: session.always });
  const messages = [...user(QUESTION), first.choices[0].message, ...user('And the sea?')];
  const answer = await session.ask({ messages });
  holds('the prompt has grown', answer.usage.prompt_tokens > first.usage.prompt_tokens + 8, answer.usage);
}

export async function chat_harmless_fields(session) {
  const answer = await session.ask({
    user: 'ada',
    metadata: { team: 'blue' },
    store: false,
    service_tier: 'auto',
    parallel_tool_calls: true,
    prompt_cache_key: 'k',
    safety_identifier: 's',
    response_format: { type: 'text' },
    modalities: ['text'],
    tools: [],
  });
  same('text', answerOf(answer), answerOf(await session.ask()));
}

export async function chat_own_fields(session) {
  const greedy = answerOf(await session.ask());
  for (const seed of [0, 1, 2])
    same('text', answerOf(await session.ask({ temperature: 1.5, seed, top_k: 1 })), greedy);
}

export async function chat_raw_response(session) {
  const { data, response, request_id } = await session.ask().withResponse();
  const id = response.headers.get('x-request-id');
  holds('x-request-id', id.startsWith('req_'), id);
  same('request_id', request_id, id);
  same('status', response.status, 200);
  same('text', answerOf(data), answerOf(await session.ask()));
}

export async function chat_request_id(session) {
  const ids = [(await session.ask())._request_id, (await session.ask())._request_id];
  holds('_request_id', ids.every((id) => id?.startsWith('req_')) && ids[0] !== ids[1], ids);
  const request = { model: session.base, messages: user(QUESTION), max_completion_tokens: 1 };
  const headers = { 'x-request-id': 'my-trace.1' };
  same('our own id', (await session.client.chat.completions.create(request, { headers }))._request_id, 'my-trace.1');
}

export async function chat_raw_stream(session) {
  const response = await session.ask({ stream: true }).asResponse();
  const kind = response.headers.get('content-type');
  const lines = (await response.text()).split('\n').filter((line) => line);
  holds('content-type', kind.startsWith('text/event-stream'), kind);
  holds('only data lines', lines.every((line) => line.startsWith('data: ')), lines);
  same('the last line', lines.at(-1), 'data: [DONE]');
}

export async function chat_model_in_url(session) {
  const client = session.clientWith(session.key, `${session.baseURL}/${session.base}`);
  const request = { model: session.base, messages: user(QUESTION), temperature: 0, max_completion_tokens: 8 };
  same('text', answerOf(await client.chat.completions.create(request)), answerOf(await session.ask()));
  same('models', (await collect(client.models.list())).map((model) => model.id), [session.base]);
}

export async function chat_abort(session) {
  const room = session.contextLength - (await session.ask()).usage.prompt_tokens - 1;
  const max_completion_tokens = Math.min(ABORTED_TOKENS, room);
  const stream = await session.ask({ stream: true, logit_bias: session.always, max_completion_tokens });
  let seen = '';
  for await (const chunk of stream) {
    seen += chunk.choices[0].delta.content ?? '';
    if (seen) break;
  }
  same('the stream is aborted', stream.controller.signal.aborted, true);
  holds('it was left before its end', seen.length > 0 && seen.length < max_completion_tokens, seen.length);
  const before = Date.now();
  const next = await session.ask({ logit_bias: session.always, max_completion_tokens: 3 });
  same('the next answer', answerOf(next), session.first.text.repeat(3));
  holds('the next answer comes soon', Date.now() - before < 30_000, Date.now() - before);
}

export async function chat_parallel(session) {
  // Answers of a known length each: a base in bf16 may round greedy ties otherwise in company than alone.
  const lengths = Array.from({ length: TOGETHER }, (_, i) => i + 1);
  const ask = (n) => session.ask({ logit_bias: session.always, max_completion_tokens: n });
  const answers = await Promise.all(lengths.map(ask));
  same('answers', answers.map(answerOf), lengths.map((n) => session.first.text.repeat(n)));
  same('ids', distinct(answers.map((answer) => answer.id)), TOGETHER);
}
