// Calls of `chat.completions` whose answers have a form: calls of tools, JSON, JSON of a schema.

import OpenAI from 'openai';
import { collect, fails, holds, QUESTION, same, textOf, user } from './session.mjs';

const COLOURS = ['blue', 'green'];
const SCHEMA = {
  type: 'object',
  properties: { colour: { type: 'string', enum: COLOURS }, sure: { type: 'boolean' } },
  required: ['colour', 'sure'],
  additionalProperties: false,
};
const PAINT = { type: 'function', function: { name: 'paint', description: 'Paint it.', parameters: SCHEMA } };
const NOW = { type: 'function', function: { name: 'now' } };
const NAMED = { type: 'function', function: { name: 'paint' } };
const FORM = { type: 'json_schema', json_schema: { name: 'colour', schema: SCHEMA, strict: true } };
const ROOM = { max_completion_tokens: 120 };

export async function tools_required(session) {
  const options = { tools: [PAINT, NOW], tool_choice: 'required', parallel_tool_calls: false, ...ROOM };
  const { message, finish_reason } = (await session.ask(options)).choices[0];
  same('content and finish_reason', [message.content, finish_reason], [null, 'tool_calls']);
  same('calls', message.tool_calls.length, 1);
  const [call] = message.tool_calls;
  holds('id', call.id.startsWith('call_'), call.id);
  same('type', call.type, 'function');
  holds('name', ['paint', 'now'].includes(call.function.name), call.function.name);
  check(call.function);
}

export async function tools_named(session) {
  const options = { tools: [PAINT, NOW], tool_choice: NAMED, ...ROOM };
  const { message, finish_reason } = (await session.ask(options)).choices[0];
  same('names', message.tool_calls.map((call) => call.function.name), ['paint']);
  same('finish_reason', finish_reason, 'stop');
  check(message.tool_calls[0].function);
}

export async function tools_none(session) {
  const { message } = (await session.ask({ tools: [PAINT], tool_choice: 'none' })).choices[0];
  same('tool_calls', message.tool_calls, undefined);
  same('content is a', typeof message.content, 'string');
}

export async function tools_stream(session) {
  const options = { tools: [PAINT], tool_choice: NAMED, ...ROOM };
  const chunks = await collect(await session.ask({ ...options, stream: true }));
  const deltas = chunks.flatMap((chunk) => chunk.choices[0].delta.tool_calls ?? []);
  const [first, ...others] = deltas;
  holds('id', first.id.startsWith('call_'), first.id);
  same('the first piece', [first.index, first.type, first.function.name], [0, 'function', 'paint']);
  holds('others have arguments only', others.every((d) => d.index === 0 && !d.id && !d.type && !d.function.name));
  const whole = (await session.ask(options)).choices[0].message.tool_calls[0].function.arguments;
  same('arguments', deltas.map((delta) => delta.function.arguments ?? '').join(''), whole);
  same('finish_reason', chunks.at(-1).choices[0].finish_reason, 'stop');
}

export async function tools_stream_helper(session) {
  const options = { model: session.base, messages: user(QUESTION), tools: [PAINT], tool_choice: NAMED, ...ROOM };
  const { message } = (await session.client.chat.completions.stream(options).finalChatCompletion()).choices[0];
  same('calls', message.tool_calls.length, 1);
  check(message.tool_calls[0].function);
}

export async function tools_conversation(session) {
  const { completions } = session.client.chat;
  const options = { model: session.base, tools: [PAINT], ...ROOM };
  const first = await completions.create({ ...options, messages: user(QUESTION), tool_choice: NAMED });
  const called = first.choices[0].message;
  const result = { role: 'tool', tool_call_id: called.tool_calls[0].id, content: '{"painted": true}' };
  const messages = [...user(QUESTION), called, result];
  const second = await completions.create({ ...options, messages, tool_choice: 'none', max_completion_tokens: 8 });
  holds('the prompt has grown', second.usage.prompt_tokens > first.usage.prompt_tokens + 8, second.usage);
  same('content is a', typeof second.choices[0].message.content, 'string');
}

export const tools_unknown_choice = (session) =>
  fails(
    OpenAI.BadRequestError,
    () => session.ask({ tools: [PAINT], tool_choice: { type: 'function', function: { name: 'sing' } } }),
    { code: 'invalid_value', param: 'tool_choice.function.name' },
  );

export async function format_json_object(session) {
  const text = (await session.ask({ response_format: { type: 'json_object' } })).choices[0].message.content;
  holds('it begins as an object', text.startsWith('{'), text);
}

export async function format_json_schema(session) {
  const choice = (await session.ask({ response_format: FORM, ...ROOM })).choices[0];
  same('finish_reason', choice.finish_reason, 'stop');
  const value = JSON.parse(choice.message.content);
  same('fields', Object.keys(value), ['colour', 'sure']);
  holds('values', COLOURS.includes(value.colour) && typeof value.sure === 'boolean', value);
  const chunks = await collect(await session.ask({ response_format: FORM, stream: true, ...ROOM }));
  same('streamed', JSON.parse(textOf(chunks)), value);
}

export const format_not_enforceable = (session) => {
  const schema = { type: 'object', properties: { a: { not: {} } } };
  const form = { type: 'json_schema', json_schema: { name: 'n', schema, strict: true } };
  const ask = () => session.ask({ response_format: form });
  return fails(OpenAI.BadRequestError, ask, { code: 'invalid_value', param: 'response_format' });
};

// The arguments fit what was asked for.
function check({ name, arguments: text }) {
  const value = JSON.parse(text);
  if (name === 'now') return same('arguments', value, {});
  same('arguments', Object.keys(value), ['colour', 'sure']);
  holds('values', COLOURS.includes(value.colour) && typeof value.sure === 'boolean', value);
}
