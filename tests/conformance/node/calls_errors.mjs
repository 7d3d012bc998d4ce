// Calls that must fail, each with the client's own class of error and a body that names what is wrong.

import OpenAI, { toFile } from 'openai';
import { collect, fails, holds, QUESTION, same, user, waitFor } from './session.mjs';

const REVOKED_WITHIN_MS = 5000;

const badChat = (session, code, param, options) =>
  fails(OpenAI.BadRequestError, () => session.ask(options), { code, param });

export const error_unknown_field = (session) => badChat(session, 'unknown_parameter', 'nonsense', { nonsense: 1 });

export const error_unsupported_field = (session) =>
  badChat(session, 'unsupported_parameter', 'prediction', { prediction: { type: 'content', content: 'blue' } });

export const error_missing_field = (session) =>
  badChat(session, 'missing_required_parameter', 'messages', { messages: undefined });

export const error_invalid_value = (session) => badChat(session, 'invalid_value', 'temperature', { temperature: 3 });

export const error_invalid_type = (session) => badChat(session, 'invalid_type', 'temperature', { temperature: 'hot' });

export const error_in_message = (session) =>
  badChat(session, 'invalid_value', 'messages[1].role', {
    messages: [...user(QUESTION), { role: 'alien', content: 'hello' }],
  });

export const error_before_stream = (session) =>
  badChat(session, 'invalid_value', 'top_p', { top_p: 2, stream: true });

export async function error_context_length(session) {
  const messages = user('word '.repeat(session.contextLength + 100));
  const error = await badChat(session, 'context_length_exceeded', 'messages', { messages });
  const limit = String(session.contextLength);
  holds('the message says the limit', error.message.replaceAll(',', '').includes(limit), error.message);
}

export async function error_wrong_key(session) {
  const key = 'sk-' + 'wrong'.repeat(8);
  const list = () => session.clientWith(key).models.list();
  const error = await fails(OpenAI.AuthenticationError, list, { code: 'invalid_api_key', param: null });
  holds('the message masks the key', !error.message.includes(key) && error.message.includes('sk-wro'), error.message);
}

export async function error_no_key(session) {
  const list = () => session.clientWith('none').models.list({ headers: { Authorization: null } });
  const error = await fails(OpenAI.AuthenticationError, list, { code: null });
  holds('the message says how to send one', error.message.includes('Authorization'), error.message);
}

export async function error_revoked_key(session) {
  const key = await session.mint(session.owner, 'inference');
  const client = session.clientWith(key.secret);
  holds('it works at first', (await collect(client.models.list())).length > 0);
  await session.admin.delete(`/tuneloom/keys/${key.id}`);
  const refused = async () => {
    try {
      await client.models.list();
      return false;
    } catch (error) {
      return error instanceof OpenAI.AuthenticationError;
    }
  };
  await waitFor('the key to be refused', refused, REVOKED_WITHIN_MS, 200);
}

export async function error_scope_training(session) {
  const client = session.clientWith((await session.mint(session.owner, 'inference')).secret);
  const file = await toFile(Buffer.from('{}'), 'a.jsonl');
  await forbidden(() => client.files.create({ file, purpose: 'fine-tune' }), 'training');
  await forbidden(() => client.fineTuning.jobs.list(), 'training');
  holds('it may still see models', (await collect(client.models.list())).length > 0);
}

export async function error_scope_inference(session) {
  const client = session.clientWith((await session.mint(session.owner, 'training')).secret);
  const { base: model } = session;
  await forbidden(() => client.chat.completions.create({ model, messages: user(QUESTION) }), 'inference');
  await forbidden(() => client.completions.create({ model, prompt: QUESTION }), 'inference');
}

export const error_scope_admin = (session) =>
  forbidden(() => session.client.post('/tuneloom/keys', { body: { name: 'mine' } }), 'account');

export async function error_unknown_model(session) {
  const expected = { code: 'model_not_found', param: 'model' };
  for (const model of ['no-such-model', 'ft:no:such:model:12345678', 'no-such-model@v1', '../../etc/passwd']) {
    const error = await fails(OpenAI.NotFoundError, () => session.ask({ model }), expected);
    const message = `The model \`${model}\` does not exist or you do not have access to it.`;
    same('message', error.error.message, message);
  }
}

export async function error_unknown_file(session) {
  const retrieve = () => session.client.files.retrieve('file-none');
  const error = await fails(OpenAI.NotFoundError, retrieve, { param: 'id', code: null });
  holds('message', error.message.includes('No such File object: file-none'), error.message);
}

export async function error_unknown_upload(session) {
  const { uploads } = session.client;
  const data = await toFile(Buffer.from('x'), 'part');
  await fails(OpenAI.NotFoundError, () => uploads.cancel('upload_none'), { param: 'id' });
  await fails(OpenAI.NotFoundError, () => uploads.parts.create('upload_none', { data }), { param: 'id' });
}

export async function error_unknown_job(session) {
  const { jobs } = session.client.fineTuning;
  const id = 'ftjob-none';
  const calls = [
    () => jobs.retrieve(id),
    () => jobs.cancel(id),
    () => jobs.pause(id),
    () => jobs.resume(id),
    () => jobs.listEvents(id),
    () => jobs.checkpoints.list(id),
  ];
  for (const call of calls) {
    const error = await fails(OpenAI.NotFoundError, call, { code: 'fine_tune_not_found' });
    holds('message', error.message.includes(id), error.message);
  }
}

export async function error_foreign(session) {
  const stranger = session.clientWith((await session.mint(`${session.owner}-2`, 'inference', 'training')).secret);
  const { jobs } = stranger.fineTuning;
  const [file, job] = [session.earlier('file').id, session.earlier('job').id];
  await fails(OpenAI.NotFoundError, () => stranger.files.retrieve(file), { param: 'id' });
  await fails(OpenAI.NotFoundError, () => stranger.files.delete(file), { param: 'id' });
  await fails(OpenAI.NotFoundError, () => jobs.retrieve(job), { code: 'fine_tune_not_found' });
  const create = () => jobs.create({ model: session.base, training_file: file });
  await fails(OpenAI.BadRequestError, create, { param: 'training_file' });
  same("the stranger's lists", [await collect(stranger.files.list()), await collect(jobs.list())], [[], []]);
}

export async function error_too_large(session) {
  const request = { model: session.base, messages: user('x'.repeat(34 << 20)) };
  const create = () => session.client.chat.completions.create(request, { maxRetries: 0 });
  await fails(OpenAI.APIError, create, { status: 413 });
}

export async function error_request_id(session) {
  const error = await badChat(session, 'invalid_value', 'n', { n: 0 });
  holds('requestID', error.requestID?.startsWith('req_'), error.requestID);
  same('status and type', [error.status, error.type], [400, 'invalid_request_error']);
}

async function forbidden(call, scope) {
  const error = await fails(OpenAI.PermissionDeniedError, call, { code: 'insufficient_permissions' });
  holds('the message names the scope', error.message.includes(`\`${scope}\``), error.message);
}
