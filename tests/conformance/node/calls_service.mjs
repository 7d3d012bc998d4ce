// What is no method of the client: health, headers, CORS, unknown URLs, safe repetition. Plain HTTP by node.

import { randomBytes } from 'node:crypto';
import http from 'node:http';
import { toFile } from 'openai';
import { collect, holds, QUESTION, rows, same, user } from './session.mjs';

const ORIGIN = 'https://console.example';

export const healthz = async (session) => same('status', (await request(session, 'GET', '/healthz')).status, 200);

export const readyz = async (session) => same('status', (await request(session, 'GET', '/readyz')).status, 200);

export async function response_headers(session) {
  const { headers } = await request(session, 'POST', '/v1/chat/completions', { key: session.key, body: chat(session) });
  const [id, time] = [headers['x-request-id'], headers['openai-processing-ms']];
  holds('openai-processing-ms', /^\d+$/.test(time ?? ''), time);
  same('openai-version', headers['openai-version'], '2020-10-01');
  same('openai-organization', headers['openai-organization'], session.owner);
  holds('x-request-id, once', /^req_[^, ]+$/.test(id ?? ''), id);
}

export async function cors_preflight(session) {
  const { status, headers } = await request(session, 'OPTIONS', '/v1/chat/completions', {
    headers: {
      origin: ORIGIN,
      'access-control-request-method': 'POST',
      'access-control-request-headers': 'authorization,content-type',
    },
  });
  same('status', status, 200);
  const [origin, allowed, methods] = ['origin', 'headers', 'methods'].map((n) => headers[`access-control-allow-${n}`]);
  holds('access-control-allow-origin', ['*', ORIGIN].includes(origin), origin);
  holds('access-control-allow-headers', allowed?.toLowerCase().includes('authorization'), allowed);
  holds('access-control-allow-methods', methods?.includes('POST'), methods);
}

export async function cors_exposed(session) {
  for (const [key, expected] of [[session.key, 200], ['sk-wrong', 401]]) {
    const { status, headers } = await request(session, 'GET', '/v1/models', { key, headers: { origin: ORIGIN } });
    same('status', status, expected);
    const exposed = headers['access-control-expose-headers']?.toLowerCase() ?? '';
    const isExposed = exposed.includes('x-request-id') && exposed.includes('openai-processing-ms');
    holds('x-request-id is exposed', isExposed, exposed);
    const origin = headers['access-control-allow-origin'];
    holds('access-control-allow-origin', ['*', ORIGIN].includes(origin), origin);
  }
}

export async function unknown_url(session) {
  isError(await request(session, 'GET', '/v1/nothing/here', { key: session.key }), 404);
  isError(await request(session, 'GET', '/v1/nothing/here'), 401);
}

export const wrong_method = async (session) =>
  isError(await request(session, 'PUT', '/v1/chat/completions', { key: session.key, body: chat(session) }), 405);

/** A client sends a create again when the answer got lost; it must not make a second object. */
export async function create_repeated(session) {
  const { files } = session.client;
  const count = (await collect(files.list())).length;
  const data = rows(10, randomBytes(4).toString('hex'));
  const create = async (headers) =>
    (await files.create({ file: await toFile(data, 'again.jsonl'), purpose: 'fine-tune' }, { headers })).id;
  const first = await create({});
  same('the file of the retry', await create({ 'x-stainless-retry-count': '1' }), first);
  const named = { 'Idempotency-Key': randomBytes(8).toString('hex') };
  const keyed = [await create(named), await create(named)];
  same('the file of the second call with the key', keyed[1], keyed[0]);
  holds('another key, another file', keyed[0] !== first, keyed);
  same('new files', (await collect(files.list())).length - count, 2);
}

const chat = (session) => ({ model: session.base, messages: user(QUESTION), max_tokens: 1 });

function isError({ status, body }, expected) {
  same('status', status, expected);
  const { error } = JSON.parse(body);
  same('fields of the error', Object.keys(error).sort(), ['code', 'message', 'param', 'type']);
  same('type', error.type, 'invalid_request_error');
}

// Not `fetch`, which keeps `origin` and the headers of a preflight for browsers.
function request(session, method, path, { key, body, headers = {} } = {}) {
  const url = session.baseURL.replace(/\/v1$/, '') + path;
  const all = { 'content-type': 'application/json', ...headers };
  if (key) all.authorization = `Bearer ${key}`;
  return new Promise((resolve, reject) => {
    const sent = http.request(url, { method, headers: all, timeout: 60_000 }, async (response) => {
      let text = '';
      for await (const chunk of response) text += chunk;
      resolve({ status: response.statusCode, headers: response.headers, body: text });
    });
    sent.on('error', reject).on('timeout', () => sent.destroy(new Error('no answer within 60 s')));
    sent.end(body && JSON.stringify(body));
  });
}
