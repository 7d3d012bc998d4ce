// Calls of `fine_tuning.jobs`: what happens to jobs, and what a finished one leaves.

import OpenAI, { toFile } from 'openai';
import { collect, distinct, fails, holds, rows, same, sorted, waitFor } from './session.mjs';

export const SUFFIX = 'conform';
const EPOCHS = 2;
const BATCH = 4;
const STEPS = (24 * EPOCHS) / BATCH;
const JOB_TIMEOUT_MS = 600_000;
const CHECK_TIMEOUT_MS = 180_000;

const newestFirst = (session) => ['third job', 'second job', 'job'].map((name) => session.earlier(name).id);
const idsOf = async (list) => (await collect(list)).map((item) => item.id);
const ask = (session, options) =>
  session.client.fineTuning.jobs.create({ model: session.base, training_file: session.earlier('file').id, ...options });

export async function jobs_create(session) {
  const hyperparameters = { n_epochs: EPOCHS, batch_size: BATCH, learning_rate_multiplier: 'auto' };
  const files = [session.earlier('file').id, session.earlier('validation').id];
  const metadata = { team: 'blue', run: 'first' };
  const job = await ask(session, {
    validation_file: files[1],
    suffix: SUFFIX,
    seed: 7,
    metadata,
    method: { type: 'supervised', supervised: { hyperparameters } },
  });
  holds('id', job.id.startsWith('ftjob-'), job.id);
  same('object and status', [job.object, job.status], ['fine_tuning.job', 'validating_files']);
  same('model', [job.model, job.fine_tuned_model], [session.base, null]);
  same('files', [job.training_file, job.validation_file, job.result_files], [...files, []]);
  same('seed and metadata', [job.seed, job.metadata], [7, metadata]);
  same('organization_id', job.organization_id, session.owner);
  same('error and finished_at', [job.error, job.finished_at], [null, null]);
  same('method', job.method, { type: 'supervised', supervised: { hyperparameters } });
  same('hyperparameters', job.hyperparameters, hyperparameters);
  same('user_provided_suffix', job.user_provided_suffix, SUFFIX);
  session.made.job = job;
}

export async function files_delete_in_use(session) {
  const [file, job] = [session.earlier('file'), session.earlier('job')];
  const remove = () => session.client.files.delete(file.id);
  const error = await fails(OpenAI.ConflictError, remove, { code: 'file_in_use' });
  holds('the message names the job', error.message.includes(job.id), error.message);
  same('the file is still there', await session.client.files.retrieve(file.id), file);
}

export async function jobs_create_hyperparameters(session) {
  const job = await ask(session, { hyperparameters: { n_epochs: 1 }, metadata: { team: 'red' } });
  const asked = { n_epochs: 1, batch_size: 'auto', learning_rate_multiplier: 'auto' };
  same('hyperparameters', job.hyperparameters, asked);
  same('method', job.method.supervised.hyperparameters, asked);
  holds('a seed is chosen', Number.isInteger(job.seed), job.seed);
  session.made['second job'] = job;
}

export async function jobs_create_own_options(session) {
  const job = await ask(session, { tuneloom: { rank: 4, learning_rate: 1e-3 } });
  const { rank, learning_rate } = job.tuneloom.options;
  same('rank and learning_rate', [rank, learning_rate], [4, 1e-3]);
  same('status after cancelling', (await session.client.fineTuning.jobs.cancel(job.id)).status, 'cancelled');
  session.made['third job'] = job;
}

export async function jobs_retrieve(session) {
  const job = session.earlier('job');
  const found = await session.client.fineTuning.jobs.retrieve(job.id);
  same('the job', [found.id, found.created_at, found.seed], [job.id, job.created_at, job.seed]);
}

export async function jobs_list(session) {
  const page = await session.client.fineTuning.jobs.list();
  same('ids', page.data.map((job) => job.id), newestFirst(session));
  same('has_more', page.has_more, false);
}

export async function jobs_list_paging(session) {
  const page = await session.client.fineTuning.jobs.list({ limit: 1 });
  same('items of the first page', [page.data.length, page.has_more], [1, true]);
  same('ids over all pages', await idsOf(page), newestFirst(session));
}

export async function jobs_list_after(session) {
  const [newest, ...rest] = newestFirst(session);
  same('ids', await idsOf(session.client.fineTuning.jobs.list({ after: newest, limit: 10 })), rest);
}

export async function jobs_list_metadata(session) {
  const { jobs } = session.client.fineTuning;
  same('ids', await idsOf(jobs.list({ metadata: { team: 'blue' } })), [session.earlier('job').id]);
  same('ids of a filter that fits none', await idsOf(jobs.list({ metadata: { team: 'blue', run: 'second' } })), []);
}

export async function jobs_pause(session) {
  const { jobs } = session.client.fineTuning;
  const job = await jobs.pause(session.earlier('second job').id);
  same('status', job.status, 'paused');
  same('status when read', (await jobs.retrieve(job.id)).status, 'paused');
}

export async function jobs_resume(session) {
  const job = await session.client.fineTuning.jobs.resume(session.earlier('second job').id);
  holds('status', ['validating_files', 'queued', 'running'].includes(job.status), job.status);
}

export async function jobs_cancel(session) {
  const job = await session.client.fineTuning.jobs.cancel(session.earlier('second job').id);
  same('status', job.status, 'cancelled');
  holds('finished_at', job.finished_at >= job.created_at, job.finished_at);
  same('model', job.fine_tuned_model, null);
}

export const jobs_cancel_again = (session) => conflict(session, session.earlier('second job').id, 'cancelled');

export async function jobs_failed(session) {
  const bad = Buffer.concat([rows(11), Buffer.from('{"messages": [{"role": "alien", "content": "hello"}]}\n')]);
  const file = await session.client.files.create({ file: await toFile(bad, 'bad.jsonl'), purpose: 'fine-tune' });
  const created = await ask(session, { training_file: file.id });
  const job = await untilOver(session, created.id, CHECK_TIMEOUT_MS);
  same('status', job.status, 'failed');
  same('code and param', [job.error.code, job.error.param], ['invalid_training_file', 'training_file']);
  holds('the message names line 12', job.error.message.includes('12'), job.error.message);
  const events = await collect(session.client.fineTuning.jobs.listEvents(job.id));
  holds('an event of the level `error`', events.some((event) => event.level === 'error'), events);
}

export const jobs_create_unknown_file = (session) =>
  fails(OpenAI.BadRequestError, () => ask(session, { training_file: 'file-none' }), {
    param: 'training_file',
    code: 'invalid_training_file',
  });

export const jobs_create_unknown_base = (session) =>
  fails(OpenAI.NotFoundError, () => ask(session, { model: 'no-such-base' }), { code: 'model_not_found' });

export async function jobs_create_bad_hyperparameter(session) {
  const create = () => ask(session, { hyperparameters: { n_epochs: 0 } });
  const error = await fails(OpenAI.BadRequestError, create, { code: 'invalid_value' });
  holds('param', error.param.includes('n_epochs'), error.param);
}

export const jobs_create_unsupported = (session) =>
  fails(
    OpenAI.BadRequestError,
    () => ask(session, { integrations: [{ type: 'wandb', wandb: { project: 'x' } }] }),
    { code: 'unsupported_parameter', param: 'integrations' },
  );

export async function jobs_succeeded(session) {
  const asked = session.earlier('job');
  const job = await untilOver(session, asked.id, JOB_TIMEOUT_MS);
  same('status', [job.status, job.error], ['succeeded', null]);
  session.made.finished = job;
  const prefix = `ft:${session.base}:${session.owner}:${SUFFIX}:`;
  holds('fine_tuned_model', job.fine_tuned_model?.startsWith(prefix), job.fine_tuned_model);
  holds('trained_tokens', job.trained_tokens > 0, job.trained_tokens);
  holds('finished_at', job.finished_at >= job.created_at, job.finished_at);
  same('result_files', job.result_files.length, 1);
  const { n_epochs, batch_size, learning_rate_multiplier } = job.hyperparameters;
  same('n_epochs and batch_size', [n_epochs, batch_size], [EPOCHS, BATCH]);
  same('learning_rate_multiplier is a', typeof learning_rate_multiplier, 'number');
  same('what was asked', [job.seed, job.metadata], [asked.seed, asked.metadata]);
}

export async function jobs_events(session) {
  const job = session.earlier('finished');
  const page = await session.client.fineTuning.jobs.listEvents(job.id, { limit: 2 });
  same('items of the first page', [page.data.length, page.has_more], [2, true]);
  const events = await collect(page);
  same('object', events[0].object, 'fine_tuning.job.event');
  same('ids that come twice', events.length - distinct(events.map((event) => event.id)), 0);
  const times = events.map((event) => event.created_at);
  same('times, newest first', times, sorted(times, -1));
  const messages = events.map((event) => event.message);
  for (const part of ['Created fine-tuning job', 'Files validated', 'Fine-tuning job started', 'New fine-tuned model'])
    holds(`an event that says \`${part}\``, messages.some((message) => message.includes(part)), messages);
  same('the first event', messages.at(-1), `Created fine-tuning job: ${job.id}`);
  session.made.events = events;
}

export async function jobs_metrics(session) {
  const metrics = session.earlier('events').filter((event) => event.type === 'metrics').reverse();
  same('steps', metrics.map((event) => event.data.step), Array.from({ length: STEPS }, (_, i) => i + 1));
  const last = metrics.at(-1);
  holds('train_loss', metrics.every((event) => typeof event.data.train_loss === 'number'), last);
  same('total_steps', last.data.total_steps, STEPS);
  for (const name of ['train_mean_token_accuracy', 'full_valid_loss', 'full_valid_mean_token_accuracy'])
    holds(`\`${name}\` of the last step`, typeof last.data[name] === 'number', last);
  holds('the message', last.message.startsWith(`Step ${STEPS}/${STEPS}: training loss=`), last.message);
}

export async function jobs_checkpoints(session) {
  const job = session.earlier('finished');
  const { checkpoints } = session.client.fineTuning.jobs;
  const all = await collect(checkpoints.list(job.id));
  holds('at least one', all.length > 0, all);
  const kind = [all[0].object, all[0].fine_tuning_job_id];
  same('object and job', kind, ['fine_tuning.job.checkpoint', job.id]);
  const steps = all.map((checkpoint) => checkpoint.step_number);
  same('steps, newest first', steps, sorted(steps, -1));
  for (const checkpoint of all) {
    const name = `${job.fine_tuned_model}:ckpt-step-${checkpoint.step_number}`;
    same('name', checkpoint.fine_tuned_model_checkpoint, name);
    same('metrics.step', checkpoint.metrics.step, checkpoint.step_number);
    same('metrics.train_loss is a', typeof checkpoint.metrics.train_loss, 'number');
  }
  same('ids over all pages', await idsOf(checkpoints.list(job.id, { limit: 1 })), all.map((one) => one.id));
  session.made.checkpoint = all[0];
}

export async function jobs_result_file(session) {
  const id = session.earlier('finished').result_files[0];
  const { files } = session.client;
  same('purpose', (await files.retrieve(id)).purpose, 'fine-tune-results');
  const [header, ...lines] = (await (await files.content(id)).text()).trimEnd().split('\n');
  same('columns', header, 'step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy');
  const table = lines.map((line) => line.split(','));
  same('steps', table.map((row) => Number(row[0])), Array.from({ length: STEPS }, (_, i) => i + 1));
  holds('train_loss is a number in each row', table.every((row) => row[1] !== '' && Number(row[1]) >= 0), lines);
  holds('valid_loss somewhere', table.some((row) => row[3]), lines);
}

export const jobs_cancel_finished = (session) => conflict(session, session.earlier('finished').id, 'succeeded');

export async function jobs_create_on_tuned(session) {
  const model = session.earlier('finished').fine_tuned_model;
  const job = await ask(session, { model });
  same('model', job.model, model);
  same('status once cancelled', (await session.client.fineTuning.jobs.cancel(job.id)).status, 'cancelled');
  await fails(OpenAI.NotFoundError, () => ask(session, { model: `${model}x` }), { param: 'model' });
}

/** Cancelling is refused, and the client, which retries conflicts, is told not to. */
async function conflict(session, id, code) {
  let tries = 0;
  const client = session.client.withOptions({
    fetch: (...request) => {
      tries += 1;
      return fetch(...request);
    },
  });
  const error = await fails(OpenAI.ConflictError, () => client.fineTuning.jobs.cancel(id), { code });
  same('x-should-retry', error.headers.get('x-should-retry'), 'false');
  same('tries', tries, 1);
  holds('the message names the job', error.message.includes(id), error.message);
}

function untilOver(session, id, timeoutMs) {
  const over = async () => {
    const job = await session.client.fineTuning.jobs.retrieve(id);
    return ['succeeded', 'failed', 'cancelled'].includes(job.status) ? job : null;
  };
  return waitFor(`the end of ${id}`, over, timeoutMs, 1000);
}
