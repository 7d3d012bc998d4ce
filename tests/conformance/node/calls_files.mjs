// Calls of `files` and `uploads`.

import { createHash } from 'node:crypto';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import OpenAI, { toFile } from 'openai';
import { collect, fails, holds, rows, same } from './session.mjs';

const ROWS = rows(24);
const PART_BYTES = 1000;
const md5 = (data) => createHash('md5').update(data).digest('hex');
const ids = (session, ...names) => names.map((name) => session.earlier(name).id);
const idsOf = async (list) => (await collect(list)).map((file) => file.id);
const bytesOf = async (response) => Buffer.from(await response.arrayBuffer());

export async function files_create_bytes(session) {
  const file = await session.client.files.create({ file: await toFile(ROWS, 'train.jsonl'), purpose: 'fine-tune' });
  holds('id', file.id.startsWith('file-'), file.id);
  same('file', [file.object, file.filename, file.purpose], ['file', 'train.jsonl', 'fine-tune']);
  same('bytes', file.bytes, ROWS.length);
  same('status', file.status, 'processed');
  holds('created_at in seconds', Number.isInteger(file.created_at) && file.created_at > 1_700_000_000, file.created_at);
  same('expires_at', file.expires_at, null);
  session.made.file = file;
}

export async function files_create_path(session) {
  const folder = fs.mkdtempSync(path.join(os.tmpdir(), 'conformance-'));
  try {
    const name = path.join(folder, 'valid.jsonl');
    fs.writeFileSync(name, rows(12));
    const file = await session.client.files.create({ file: fs.createReadStream(name), purpose: 'fine-tune' });
    same('filename', file.filename, 'valid.jsonl');
    same('bytes', file.bytes, rows(12).length);
    session.made.validation = file;
  } finally {
    fs.rmSync(folder, { recursive: true });
  }
}

export async function files_create_expires_after(session) {
  const file = await session.client.files.create({
    file: await toFile(Buffer.from('for an hour'), 'soon.txt'),
    purpose: 'user_data',
    expires_after: { anchor: 'created_at', seconds: 3600 },
  });
  same('expires_at', file.expires_at, file.created_at + 3600);
  session.made.other = file;
}

export async function files_retrieve(session) {
  const file = session.earlier('file');
  same('the file', await session.client.files.retrieve(file.id), file);
}

export async function files_list(session) {
  const page = await session.client.files.list();
  same('ids', page.data.map((file) => file.id), ids(session, 'other', 'validation', 'file'));
  same('has_more', [page.has_more, page.hasNextPage()], [false, false]);
}

export async function files_list_paging(session) {
  const page = await session.client.files.list({ limit: 1 });
  same('items of the first page', page.data.length, 1);
  same('has_more', page.has_more, true);
  same('ids over all pages', await idsOf(page), ids(session, 'other', 'validation', 'file'));
}

export async function files_list_purpose(session) {
  const { files } = session.client;
  same('ids', await idsOf(files.list({ purpose: 'fine-tune' })), ids(session, 'validation', 'file'));
  same('ids of a purpose without files', await idsOf(files.list({ purpose: 'batch' })), []);
}

export async function files_list_order(session) {
  const { files } = session.client;
  const [oldest, ...rest] = ids(session, 'file', 'validation', 'other');
  same('ids', await idsOf(files.list({ order: 'asc' })), [oldest, ...rest]);
  same('ids after the first', await idsOf(files.list({ order: 'asc', after: oldest })), rest);
}

export async function files_content(session) {
  const { files } = session.client;
  const { id } = session.earlier('file');
  same('bytes', (await bytesOf(await files.content(id))).equals(ROWS), true);
  same('text', await (await files.content(id)).text(), ROWS.toString());
}

export async function files_wait_for_processing(session) {
  const { id } = session.earlier('file');
  const file = await session.client.files.waitForProcessing(id, { pollInterval: 200, maxWait: 30_000 });
  same('file', [file.id, file.status], [id, 'processed']);
}

export async function files_delete(session) {
  const { id } = session.earlier('other');
  const deleted = await session.client.files.delete(id);
  same('answer', [deleted.id, deleted.object, deleted.deleted], [id, 'file', true]);
  holds('gone from the list', !(await idsOf(session.client.files.list())).includes(id));
}

export async function files_delete_again(session) {
  const { files } = session.client;
  const { id } = session.earlier('other');
  await fails(OpenAI.NotFoundError, () => files.delete(id), { status: 404 });
  await fails(OpenAI.NotFoundError, () => files.retrieve(id), { param: 'id' });
  await fails(OpenAI.NotFoundError, () => files.content(id));
}

export async function files_create_not_jsonl(session) {
  const file = await toFile(Buffer.from('a,b'), 'rows.txt');
  const create = () => session.client.files.create({ file, purpose: 'fine-tune' });
  const error = await fails(OpenAI.BadRequestError, create, { param: 'file' });
  holds('the message says `.jsonl`', error.message.includes('.jsonl'), error.message);
}

export async function uploads_create(session) {
  const upload = await session.client.uploads.create({
    filename: 'parts.jsonl',
    purpose: 'fine-tune',
    bytes: ROWS.length,
    mime_type: 'application/jsonl',
  });
  holds('id', upload.id.startsWith('upload_'), upload.id);
  same('status', [upload.status, upload.file], ['pending', null]);
  same('filename and bytes', [upload.filename, upload.bytes], ['parts.jsonl', ROWS.length]);
  same('expires an hour later', upload.expires_at - upload.created_at, 3600);
  session.made.upload = upload;
}

export async function uploads_parts_create(session) {
  const upload = session.earlier('upload');
  const { parts } = session.client.uploads;
  // The last part is sent first: the order is what `complete` says, not that of arrival.
  const later = await parts.create(upload.id, { data: await toFile(ROWS.subarray(PART_BYTES), 'part') });
  const first = await parts.create(upload.id, { data: await toFile(ROWS.subarray(0, PART_BYTES), 'part') });
  holds('id', first.id.startsWith('part_'), first.id);
  same('part', [first.object, first.upload_id], ['upload.part', upload.id]);
  session.made.parts = [first.id, later.id];
}

export async function uploads_complete(session) {
  const upload = session.earlier('upload');
  const part_ids = session.earlier('parts');
  const done = await session.client.uploads.complete(upload.id, { part_ids, md5: md5(ROWS) });
  same('status', [done.id, done.status], [upload.id, 'completed']);
  const { filename, bytes, status } = done.file;
  same('file', [filename, bytes, status], ['parts.jsonl', ROWS.length, 'processed']);
  same('bytes', (await bytesOf(await session.client.files.content(done.file.id))).equals(ROWS), true);
}

export async function uploads_complete_wrong_md5(session) {
  const { uploads } = session.client;
  const asked = { filename: 'parts.jsonl', purpose: 'fine-tune', bytes: 4, mime_type: 'application/jsonl' };
  const upload = await uploads.create(asked);
  const part = await uploads.parts.create(upload.id, { data: await toFile(Buffer.from('{}\n\n'), 'part') });
  const complete = () => uploads.complete(upload.id, { part_ids: [part.id], md5: '0'.repeat(32) });
  await fails(OpenAI.BadRequestError, complete, { param: 'md5' });
  session.made['unfinished upload'] = { upload, part };
}

export async function uploads_cancel(session) {
  const { upload, part } = session.earlier('unfinished upload');
  const cancelled = await session.client.uploads.cancel(upload.id);
  same('status', cancelled.status, 'cancelled');
  const complete = () => session.client.uploads.complete(upload.id, { part_ids: [part.id] }, { maxRetries: 0 });
  await fails(OpenAI.ConflictError, complete, { code: 'cancelled' });
}
