// Calls of `models`, and of the model that the finished job has made.

import OpenAI from 'openai';
import { SUFFIX } from './calls_jobs.mjs';
import { answerOf, collect, distinct, fails, holds, QUESTION, same, user } from './session.mjs';

const PINNED = `${SUFFIX}@v1`;
const names = (session) => [SUFFIX, PINNED, session.earlier('finished').fine_tuned_model];
const NOT_FOUND = { code: 'model_not_found', param: 'model' };

export async function models_list(session) {
  const byId = Object.fromEntries((await collect(session.client.models.list())).map((model) => [model.id, model]));
  for (const name of [session.base, ...names(session)]) holds(`\`${name}\` is listed`, name in byId, Object.keys(byId));
  const tuned = byId[SUFFIX];
  same('object and owned_by', [tuned.object, tuned.owned_by], ['model', session.owner]);
  holds('created in seconds', Number.isInteger(tuned.created) && tuned.created > 1_700_000_000, tuned.created);
  same('root or parent', tuned.parent, session.base);
}

export async function models_retrieve_base(session) {
  const model = await session.client.models.retrieve(session.base);
  same('model', [model.id, model.object], [session.base, 'model']);
  same('max_model_len', model.max_model_len, session.contextLength);
}

export async function models_retrieve_tuned(session) {
  for (const name of [...names(session), session.earlier('checkpoint').fine_tuned_model_checkpoint]) {
    const model = await session.client.models.retrieve(name);
    same('model', [model.id, model.object, model.owned_by], [name, 'model', session.owner]);
  }
}

export async function models_retrieve_unknown(session) {
  for (const name of ['no-such-model', 'no/such/model', `${SUFFIX}@v99`]) {
    const retrieve = () => session.client.models.retrieve(name);
    await fails(OpenAI.NotFoundError, retrieve, { code: 'model_not_found' });
  }
}

export async function models_chat_tuned(session) {
  const answers = [];
  for (const model of names(session)) answers.push(await session.ask({ model }));
  same('models', answers.map((answer) => answer.model), names(session));
  same('different answers', distinct(answers.map(answerOf)), 1);
  same('different weights', distinct(answers.map((answer) => answer.system_fingerprint)), 1);
  const base = await session.ask();
  holds('not those of the base', answers[0].system_fingerprint !== base.system_fingerprint, base.system_fingerprint);
}

export async function models_chat_checkpoint(session) {
  const model = session.earlier('checkpoint').fine_tuned_model_checkpoint;
  const [answer, base] = [await session.ask({ model }), await session.ask()];
  same('model', answer.model, model);
  same('content is a', typeof answerOf(answer), 'string');
  holds('not the base', answer.system_fingerprint !== base.system_fingerprint, base.system_fingerprint);
}

export async function models_chat_in_url(session) {
  for (const model of [SUFFIX, session.earlier('finished').fine_tuned_model]) {
    const client = session.clientWith(session.key, `${session.baseURL}/${model}`);
    const request = { model, messages: user(QUESTION), temperature: 0, max_completion_tokens: 8 };
    const answer = await client.chat.completions.create(request);
    same('text', answerOf(answer), answerOf(await session.ask({ model })));
    same('models', (await collect(client.models.list())).map((entry) => entry.id), [model]);
  }
}

export async function models_foreign(session) {
  const stranger = session.clientWith((await session.mint(`${session.owner}-2`, 'inference', 'training')).secret);
  for (const model of names(session)) {
    const chat = () => stranger.chat.completions.create({ model, messages: user(QUESTION) });
    await fails(OpenAI.NotFoundError, chat, NOT_FOUND);
    await fails(OpenAI.NotFoundError, () => stranger.models.retrieve(model), NOT_FOUND);
    await fails(OpenAI.NotFoundError, () => stranger.models.delete(model), NOT_FOUND);
  }
  const seen = (await collect(stranger.models.list())).map((model) => model.id);
  holds('not in the list', !seen.some((id) => names(session).includes(id)), seen);
}

export async function models_delete_base(session) {
  await fails(OpenAI.PermissionDeniedError, () => session.client.models.delete(session.base), { status: 403 });
  same('it still answers', (await session.ask()).model, session.base);
}

export async function models_delete(session) {
  const gone = names(session);
  const deleted = await session.client.models.delete(SUFFIX);
  same('answer', [deleted.id, deleted.object, deleted.deleted], [SUFFIX, 'model', true]);
  for (const model of gone)
    await fails(OpenAI.NotFoundError, () => session.ask({ model }), { code: 'model_not_found' });
  const left = (await collect(session.client.models.list())).map((model) => model.id);
  same('what is left in the list', left.filter((id) => gone.includes(id)), []);
}

export const models_delete_again = (session) =>
  fails(OpenAI.NotFoundError, () => session.client.models.delete(SUFFIX), { code: 'model_not_found' });
