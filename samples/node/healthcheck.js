'use strict';

const request = require('http').get(
  { host: '127.0.0.1', port: Number(process.env.PORT || 3000), path: '/healthz', timeout: 2000 },
  (res) => process.exit(res.statusCode === 200 ? 0 : 1),
);
request.on('timeout', () => request.destroy());
request.on('error', () => process.exit(1));
