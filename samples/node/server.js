'use strict';

const express = require('express');
const os = require('os');

const app = express();
app.disable('x-powered-by');

app.get('/', (req, res) => {
  res.json({
    message: 'Hello from Node.js',
    node: process.version,
    uid: process.getuid(),
    host: os.hostname(),
    env: process.env.NODE_ENV,
  });
});

app.get('/healthz', (req, res) => res.type('text').send('ok\n'));

const server = app.listen(Number(process.env.PORT || 3000), () => {
  console.log(`listening on ${server.address().port}`);
});

// As process 1 nothing but this ends us on `stop`: finish what is being served, then go.
for (const signal of ['SIGTERM', 'SIGINT']) {
  process.on(signal, () => {
    console.log(`${signal}: closing`);
    server.close(() => process.exit(0));
    server.closeIdleConnections();
  });
}
