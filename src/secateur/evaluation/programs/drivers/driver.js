// Runs program.js, whose checks are at its end, and says the token of standard input if all of them held. Checks call
// `require` by the name that is given as the first argument, and `done` of it behind the last one; what they use of node
// is frozen before.
'use strict';
const fs = require('node:fs');
const Module = require('node:module');
const assert = require('node:assert');
const path = require('node:path');
const token = fs.readFileSync(0, 'utf8');
const [name] = process.argv.splice(2);
const write = fs.writeSync;
const bytes = Buffer.from;
const leave = process.reallyExit.bind(process);

function frozen(object) {
  for (const key of Reflect.ownKeys(object)) {
    const property = Object.getOwnPropertyDescriptor(object, key);
    if (property && typeof property.value === 'function' && !Object.isFrozen(property.value)) {
      Object.freeze(property.value);
    }
  }
  return Object.freeze(object);
}
console.assert = (holds, ...message) => {
  if (!holds) assert.fail(message.join(' ') || 'console.assert');
};
frozen(assert.strict);
frozen(assert);
Object.freeze(console);
const original = require;
const known = new Map([['assert', assert], ['assert/strict', assert.strict]]);
const get = known.get.bind(known);
const checked = name => get(name.replace('node:', '')) || original(name);
let done = false;
checked.done = () => { done = true; };
Object.defineProperty(globalThis, name, {value: Object.freeze(checked), writable: false});

// A pipe that a program has filled takes no more for a while.
function say(descriptor, text) {
  const whole = bytes(text);
  for (let done = 0; done < whole.length;) {
    try {
      done += write(descriptor, whole, done);
    } catch (error) {
      if (error.code !== 'EAGAIN') throw error;
    }
  }
}
function failed(error) {
  say(2, `${error && error.stack ? error.stack : error}\n`);
  if (error instanceof assert.AssertionError) leave(97);
  if (error instanceof SyntaxError) leave(96);
  leave(error instanceof RangeError && error.message === 'Array buffer allocation failed' ? 95 : 1);
}
process.on('uncaughtException', failed);
try {
  const file = path.join(__dirname, 'program.js');
  const program = new Module(file);
  program.filename = file;
  program.paths = [];
  program._compile(fs.readFileSync(file, 'utf8'), file);
} catch (error) {
  failed(error);
}
if (done) say(1, `\n${token}\n`);
leave(0);
