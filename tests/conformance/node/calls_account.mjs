// What an owner and an admin look after: webhooks, keys of models, admin keys, the audit log, usage and costs.

import http from 'node:http';
import OpenAI from 'openai';
import { SUFFIX } from './calls_jobs.mjs';
import { collect, fails, holds, Lacking, same, sorted, user, waitFor } from './session.mjs';

const EVENTS = ['fine_tuning.job.succeeded', 'fine_tuning.job.cancelled'];
// Nothing has such a name (RFC 2606), so that nobody is ever called.
const URL = 'https://hooks.invalid/tuneloom';
const ARRIVES_WITHIN_MS = 30_000;

export async function webhooks_create(session) {
  const hooks = await hooksOf(session);
  const made = await hooks.create({ url: URL, event_types: EVENTS, name: 'conformance' });
  holds('signing_secret', made.signing_secret.startsWith('whsec_'), made.signing_secret.slice(0, 6));
  same('what came back', [made.object, made.url, made.event_types], ['webhook_endpoint', URL, EVENTS]);
  const again = await hooks.retrieve(made.id);
  same('retrieved', [again.id, again.name], [made.id, 'conformance']);
  holds('the secret is not shown again', !JSON.stringify(again).includes(made.signing_secret));
  session.made.hook = made;
}

export async function webhooks_list_update(session) {
  const [hooks, hook] = [await hooksOf(session), session.earlier('hook')];
  same('ids', (await collect(hooks.list())).map((endpoint) => endpoint.id), [hook.id]);
  same('name', (await hooks.update(hook.id, { name: 'other' })).name, 'other');
  same('what was not named', (await hooks.retrieve(hook.id)).event_types, EVENTS);
}

export async function webhooks_event_types(session) {
  const { data } = await (await hooksOf(session)).eventTypes.list();
  const wanted = ['succeeded', 'failed', 'cancelled'].map((end) => `fine_tuning.job.${end}`);
  holds("OpenAI's types of jobs", wanted.every((type) => data.includes(type)), data);
}

export async function webhooks_rotate_secret(session) {
  const [hooks, hook] = [await hooksOf(session), session.earlier('hook')];
  const rotated = await hooks.rotateSecret(hook.id, { keep_old_secret_active_for_24_hours: false });
  holds('another secret', rotated.signing_secret !== hook.signing_secret);
}

export async function webhooks_test_unreachable(session) {
  const [hooks, hook] = [await hooksOf(session), session.earlier('hook')];
  const expected = { code: 'webhook_unreachable' };
  await fails(OpenAI.BadRequestError, () => hooks.test(hook.id, { event_type: EVENTS[0] }), expected);
}

export async function webhooks_wrong_url(session) {
  const hooks = await hooksOf(session);
  for (const url of ['ftp://example.com/', 'https://user:password@example.com/', 'no url'])
    await fails(OpenAI.BadRequestError, () => hooks.create({ url, event_types: EVENTS, name: 'x' }), { param: 'url' });
}

/** A real delivery to a receiver beside this process, where the server's settings let webhooks come here. */
export async function webhooks_unwrap(session) {
  const [client, file] = [await accountOf(session), session.earlier('file').id];
  const { url, arrived, close } = await receiver();
  try {
    const body = { url, event_types: EVENTS, name: 'here' };
    const made = await client.post('/webhook_endpoints', { body }).catch((error) => {
      if (!(error instanceof OpenAI.BadRequestError)) throw error;
      same('the field that the refusal names', error.param, 'url');
      throw new Lacking();
    });
    const job = await client.fineTuning.jobs.create({ model: session.base, training_file: file });
    await client.fineTuning.jobs.cancel(job.id);
    const { payload, headers } = await arrived;
    const event = await client.webhooks.unwrap(payload, headers, made.signing_secret);
    same('event', [event.type, event.data.id, event.object], ['fine_tuning.job.cancelled', job.id, 'event']);
    const wrong = `whsec_${'A'.repeat(43)}=`;
    const verify = () => client.webhooks.verifySignature(payload, headers, wrong);
    await fails(OpenAI.InvalidWebhookSignatureError, verify);
    await client.delete(`/webhook_endpoints/${made.id}`);
  } finally {
    close();
  }
}

export async function webhooks_foreign(session) {
  const hooks = await hooksOf(session, `${session.owner}-other`);
  same('endpoints', await collect(hooks.list()), []);
  for (const id of [session.earlier('hook').id, 'no-such-hook'])
    await fails(OpenAI.NotFoundError, () => hooks.retrieve(id));
}

export async function webhooks_delete(session) {
  const [hooks, hook] = [await hooksOf(session), session.earlier('hook')];
  same('deleted', (await hooks.delete(hook.id)).deleted, true);
  await fails(OpenAI.NotFoundError, () => hooks.retrieve(hook.id));
}

/** Made without a body; it calls that model and finds nothing else. */
export async function keys_of_model(session) {
  const made = await (await accountOf(session)).post(`/tuneloom/models/${SUFFIX}/keys`);
  same('what it is for', [made.name, made.models, made.scopes], [SUFFIX, [SUFFIX], ['inference']]);
  const client = session.clientWith(made.secret);
  const names = (await collect(client.models.list())).map((model) => model.id);
  holds('only that model is listed', names.includes(SUFFIX) && !names.includes(session.base), names);
  const chat = (model) => client.chat.completions.create({ model, messages: user('hello'), max_tokens: 1 });
  same('model', (await chat(SUFFIX)).model, SUFFIX);
  await fails(OpenAI.NotFoundError, () => chat(session.base), { code: 'model_not_found' });
}

/** A job that brings its model's first key, shown this once. */
export async function keys_first(session) {
  const { jobs } = (await accountOf(session)).fineTuning;
  const body = { model: session.base, training_file: session.earlier('file').id, tuneloom: { first_key: true } };
  const job = await jobs.create(body);
  const { key, name } = job.tuneloom;
  holds('secret', key.secret.startsWith('sk-'));
  same('models', key.models, [name]);
  holds('it is not shown again', !('key' in (await jobs.retrieve(job.id)).tuneloom));
  await jobs.cancel(job.id);
}

/** The old secret works on for the overlap; without one it ends. */
export async function keys_rotate(session) {
  const client = await accountOf(session);
  const made = await client.post('/tuneloom/keys', { body: { scopes: ['inference'] } });
  const path = `/tuneloom/keys/${made.id}/rotate`;
  const second = await client.post(path, { body: { overlap: '1h' } });
  for (const { secret } of [made, second]) await collect(session.clientWith(secret).models.list());
  await client.post(path, { body: {} });
  const old = session.clientWith(made.secret);
  await waitFor("the old secret's end", () => isRefused(() => old.models.list()), 5000, 200);
}

export async function admin_keys(session) {
  const keys = adminOf(session).adminAPIKeys;
  const made = await keys.create({ name: 'conformance' });
  holds('value', made.value.startsWith('sk-'));
  await session.clientWith(made.value).get('/tuneloom/bases');
  holds('it is listed', (await collect(keys.list())).some((key) => key.id === made.id));
  same('name', (await keys.retrieve(made.id)).name, 'conformance');
  same('deleted', (await keys.delete(made.id)).deleted, true);
  await fails(OpenAI.NotFoundError, () => keys.retrieve(made.id));
}

export async function admin_audit_logs(session) {
  const logs = adminOf(session).auditLogs;
  const query = { event_types: ['api_key.created'], effective_at: { gte: session.began }, limit: 2 };
  const entries = await collect(logs.list(query));
  holds('keys of this run, over more pages than one', entries.length > 2, entries.length);
  holds('types', entries.every((entry) => entry.type === 'api_key.created'));
  holds('actor and time', entries[0].actor && entries[0].effective_at >= session.began, entries[0]);
  const times = entries.map((entry) => entry.effective_at);
  same('newest first', times, sorted(times, -1));
  const one = await collect(logs.list({ resource_ids: [entries[0]['api_key.created'].id] }));
  holds('found by what it was done to', one.some((entry) => entry.id === entries[0].id));
}

export async function admin_usage(session) {
  const { usage } = adminOf(session);
  await session.ask();
  const result = await waitFor(
    'the use of this run',
    async () => {
      const query = { start_time: session.began, project_ids: [session.owner], group_by: ['model'] };
      const { data } = await usage.completions(query);
      return data.flatMap((bucket) => bucket.results).find((found) => found.model === session.base);
    },
    ARRIVES_WITHIN_MS,
  );
  holds('tokens', result.input_tokens > 0 && result.output_tokens > 0, result);
  holds('requests', result.num_model_requests > 0, result);
}

export async function admin_costs(session) {
  const page = await adminOf(session).usage.costs({ start_time: session.began, group_by: ['line_item'] });
  same('object', page.object, 'page');
  const [bucket] = page.data;
  holds('a bucket', bucket.start_time <= session.began && session.began < bucket.end_time, bucket);
}

/** Others may read neither the log nor usage of all. */
export async function admin_refused(session) {
  for (const path of ['audit_logs', 'admin_api_keys', 'usage/completions?start_time=1', 'costs?start_time=1']) {
    const expected = { code: 'insufficient_permissions' };
    await fails(OpenAI.PermissionDeniedError, () => session.client.get(`/organization/${path}`), expected);
  }
}

/** A client that may look after what the owner has. */
async function accountOf(session, owner = session.owner) {
  const name = `account of ${owner}`;
  if (!(name in session.made)) {
    const { secret } = await session.mint(owner, 'inference', 'training', 'account');
    session.made[name] = session.clientWith(secret);
  }
  return session.made[name];
}

async function hooksOf(session, owner) {
  const { webhooks } = await accountOf(session, owner);
  if (!webhooks?.create) throw new Lacking();
  return webhooks;
}

function adminOf(session) {
  if (!session.admin.admin) throw new Lacking();
  return session.admin.withOptions({ adminAPIKey: session.admin.apiKey }).admin.organization;
}

async function isRefused(call) {
  try {
    await call();
  } catch (error) {
    if (error instanceof OpenAI.AuthenticationError) return true;
    throw error;
  }
  return false;
}

/** A receiver on loopback: its URL, and a promise of the first that comes to it. */
function receiver() {
  return new Promise((started) => {
    let arrive, giveUp;
    const arrived = new Promise((resolve, reject) => ([arrive, giveUp] = [resolve, reject]));
    // Whoever never waits for it is not told.
    arrived.catch(() => {});
    const timer = setTimeout(() => giveUp(new Error('nothing was delivered')), ARRIVES_WITHIN_MS);
    const server = http.createServer(async (request, response) => {
      let payload = '';
      for await (const chunk of request) payload += chunk;
      arrive({ payload, headers: request.headers });
      response.writeHead(204).end();
    });
    const close = () => {
      clearTimeout(timer);
      server.closeAllConnections();
      server.close();
    };
    server.listen(0, '127.0.0.1', () => started({ url: `http://127.0.0.1:${server.address().port}/`, arrived, close }));
  });
}
