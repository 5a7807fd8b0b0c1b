'use strict';

const assert = require('node:assert');
const { spawn } = require('node:child_process');
const test = require('node:test');

test('answers, and ends on SIGTERM', async () => {
  const server = spawn(process.execPath, ['server.js'], { env: { ...process.env, PORT: '0' } });
  const port = await new Promise((resolve) => {
    server.stdout.on('data', (text) => {
      const found = /listening on (\d+)/.exec(text);
      if (found) resolve(found[1]);
    });
  });
  const answer = await fetch(`http://127.0.0.1:${port}/`, { headers: { connection: 'close' } });
  assert.strictEqual((await answer.json()).message, 'Hello from Node.js');
  const ended = new Promise((resolve) => server.on('exit', resolve));
  server.kill('SIGTERM');
  assert.strictEqual(await ended, 0);
});
