"""In JavaScript."""

from tests.evaluation.programs.hostile import FAILED, WRONG, Hostile

_ATTEMPT = "const assert = require('node:assert');\nassert.deepEqual(attempt(), true);\n"
_HONEST = "const assert = require('node:assert');\nassert.deepEqual(answer(20), [42]);\n"


def _tries(name: str, code: str, outcomes: tuple[str, ...] = FAILED) -> Hostile:
    return Hostile(name, "javascript", code, outcomes, _ATTEMPT)


def _forges(name: str, code: str, outcomes: tuple[str, ...]) -> Hostile:
    return Hostile(name, "javascript", code, outcomes, _HONEST)


PROGRAMS = (
    _tries("read a secret", "const attempt = () => require('fs').readFileSync('{secret}', 'utf8').includes('SECRET');"),
    _tries("read the environment", "const attempt = () => JSON.stringify(process.env).includes('SECRET');", WRONG),
    _tries("write outside", "const attempt = () => { require('fs').writeFileSync('{folder}/mark', 'x'); return true; };"),
    _tries(
        "connect to a listener on loopback",
        """
const attempt = () => {
  const script = "require('net').connect({port}, '127.0.0.1', () => process.exit(7)).on('error', () => process.exit(3))";
  return require('child_process').spawnSync(process.execPath, ['-e', script], {timeout: 5000}).status !== 3;  // 3: refused
};
""",
        WRONG,
    ),
    _tries("send a signal to another process", "const attempt = () => process.kill({pid}, 'SIGTERM');"),
    _tries(
        "allocate 2 GiB",
        "const attempt = () => { const all = []; for (let i = 0; i < 32; i++) all.push(Buffer.alloc(64 << 20, 1)); return true; };",
        ("memory", "error", "crash"),
    ),
    _tries(
        "allocate objects",
        "const attempt = () => { const all = []; for (let i = 0; i < 1e8; i++) all.push({i}); return true; };",
        ("memory", "error", "crash", "timeout"),
    ),
    _tries(
        "loop",
        "const attempt = () => { const end = Date.now() + 40000; while (Date.now() < end); return true; };",
        ("timeout",),
    ),
    _tries(
        "write without end",
        """
const attempt = () => {
  for (let i = 0; i < 100000; i++) {
    try { require('fs').writeSync(1, 'x'.repeat(65536)); } catch (error) { if (error.code !== 'EAGAIN') throw error; }
  }
  return true;
};
""",
        ("output",),
    ),
    _forges("exit 0 early", "process.exit(0);", ("no_verdict",)),
    _forges("exit 0 in the answer", "function answer(x) { process.reallyExit(0); }", ("no_verdict",)),
    _forges("print what success prints", "console.log('passed'); process.exit(0);", ("no_verdict",)),
    _forges("replace assert", "const a = require('assert'); a.deepEqual = () => {}; function answer(x) { return [41]; }", WRONG),
    _forges("hide require", "function require() { return {deepEqual() {}}; }\nfunction answer(x) { return [41]; }", WRONG),
    _forges(
        "replace how modules are loaded",
        """
const Module = require('module');
Module.prototype.require = Module._load = () => ({deepEqual() {}});
function answer(x) { return [41]; }
""",
        WRONG,
    ),
    _forges("return before the checks", "function answer(x) { return [41]; }\nreturn answer(1);", ("no_verdict",)),
    _forges("leave the checks out", "function answer(x) { return [41]; }\nif (require.main === module)", WRONG),
    _forges("swallow the checks", "function answer(x) { return [41]; }\nlet t = () =>", ("compile_error",)),
    _forges("swallow the checks in a loop", "function answer(x) { return [41]; }\nfor (const x of [])", WRONG),
    _forges("catch the exit code", "process.on('exit', () => { process.exitCode = 0; });\nfunction answer(x) { return [41]; }", WRONG),
    _forges("look for the token in arguments", "console.log(process.argv, process.execArgv); process.exit(0);", ("no_verdict",)),
    _forges("wait for input", "function answer(x) { return [Number(require('fs').readFileSync(0, 'utf8'))]; }", WRONG),
)  # fmt: skip
