// Drives a running server call by call with the `openai` package for Node. Prints one JSON line for each call.
//
// Runs from a folder whose node_modules holds that package and nothing else is needed; cases.json lies beside it.

import { readFileSync } from 'node:fs';
import { parseArgs } from 'node:util';
import { VERSION } from 'openai/version';
import * as account from './calls_account.mjs';
import * as chat from './calls_chat.mjs';
import * as completions from './calls_completions.mjs';
import * as errors from './calls_errors.mjs';
import * as files from './calls_files.mjs';
import * as jobs from './calls_jobs.mjs';
import * as models from './calls_models.mjs';
import * as service from './calls_service.mjs';
import * as tools from './calls_tools.mjs';
import { Lacking, Session, Unmet } from './session.mjs';

const MODULES = {
  Files: files,
  Uploads: files,
  'Fine-tuning jobs': jobs,
  'Chat completions': chat,
  'Tools and forms': tools,
  Completions: completions,
  Errors: errors,
  Service: service,
  'A finished job': jobs,
  Webhooks: account,
  Keys: account,
  Administration: account,
  Models: models,
};

async function attempt(name, call, session) {
  const started = performance.now();
  let reason = null;
  let lacks = false;
  try {
    await call(session);
  } catch (error) {
    if (error instanceof Lacking) lacks = true;
    else reason = error instanceof Unmet ? error.message : `${error.constructor.name}: ${error.message}`;
  }
  const seconds = Math.round((performance.now() - started) / 10) / 100;
  return { name, ok: reason === null, seconds, reason, lacks };
}

const options = {
  'base-url': { type: 'string', default: process.env.OPENAI_BASE_URL },
  'api-key': { type: 'string', default: process.env.OPENAI_API_KEY },
  base: { type: 'string' },
};
const { values } = parseArgs({ options });
const cases = JSON.parse(readFileSync(new URL('cases.json', import.meta.url)));
console.log(JSON.stringify({ client: `openai-node ${VERSION}`, runtime: `Node ${process.versions.node}` }));
const session = await Session.open(values['base-url'], values['api-key'], values.base);
try {
  for (const [group, calls] of Object.entries(cases))
    for (const [name, [, , only]] of Object.entries(calls)) {
      if (only && only !== 'node') continue;
      const result = await attempt(name, MODULES[group][name], session);
      if (!result.ok) process.exitCode = 1;
      console.log(JSON.stringify(result));
    }
} finally {
  await session.cleanUp();
}
