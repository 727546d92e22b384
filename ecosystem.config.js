// A node under PM2: `pm2 start ecosystem.config.js` in the folder of your project.
//
// One process: nodes are equal and share a database, so a second node is a second entry with its
// own PORT, never a cluster of workers. PM2 sends SIGINT and waits longer than the node drains.
// The embedded PostgreSQL is not told (treekill: false): the node needs it until it has ended.
'use strict';

const fs = require('fs');
const path = require('path');

// A setting as the node finds it: the environment wins over .env.
function setting(name, otherwise) {
  if (process.env[name]) return process.env[name];
  const file = path.join(process.cwd(), '.env');
  const text = fs.existsSync(file) ? fs.readFileSync(file, 'utf8') : '';
  const found = text.match(new RegExp(`^\\s*(?:export\\s+)?${name}\\s*=\\s*["']?([^"'\\s#]+)`, 'm'));
  return found ? found[1] : otherwise;
}

// The program of the project's own environment if there is one, else the one on PATH.
const own = path.join(process.cwd(), '.venv', 'bin', 'orbit');
const drainSeconds = Number(setting('ORBIT_DRAIN_TIMEOUT_SECONDS', '30'));

module.exports = {
  apps: [
    {
      name: 'orbit',
      script: fs.existsSync(own) ? own : 'orbit',
      args: 'up',
      interpreter: 'none',
      cwd: process.cwd(),
      exec_mode: 'fork',
      instances: 1,
      autorestart: true,
      exp_backoff_restart_delay: 100, // ms; grows to 15 s, begins anew after 30 s of running
      kill_timeout: (drainSeconds + 10) * 1000,
      treekill: false,
      out_file: 'logs/orbit-out.log',
      error_file: 'logs/orbit-error.log',
      merge_logs: true, // no process number in the names
      env: { PYTHONUNBUFFERED: '1' },
    },
  ],
};
