import errno
import json
import shutil
from pathlib import Path

import pytest

from secateur.errors import ConfigError, OutputError, SandboxError
from secateur.evaluation.journal import Journal, encode
from secateur.evaluation.programs.checking import check, check_toolchain
from secateur.evaluation.programs.installed import outside_usr
from secateur.evaluation.programs.languages import toolchain
from secateur.evaluation.programs.loading import load_benchmark
from secateur.evaluation.programs.program import Program, Verdict
from secateur.evaluation.programs.samples import Sample
from secateur.evaluation.programs.score import render, score
from secateur.evaluation.programs.scoring import Scorer
from secateur.evaluation.sandbox.box import Job
from secateur.evaluation.sandbox.running import Sandbox, Unconfined
from secateur.files import sha256_file
from tests.evaluation.programs.mini import HONEST, RECORDS, save_samples

RIGHT = [(number, record["canonical_solution"]) for number, record in enumerate(RECORDS)]
MIXED = [
    *RIGHT[:2],
    (2, "    return a + b\n"),
    (3, "    return a +\n"),
    (4, "    raise OSError(a)\n"),
    (5, "    import os; os.abort()\n"),
]


pytestmark = pytest.mark.usefixtures("sandbox")


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_every_answer_has_its_outcome(data, tmp_path):
    samples = save_samples(tmp_path / "samples.jsonl", MIXED)
    found = score(samples, "humaneval", tmp_path / "out", run_generated_code=True, data=data)
    lines = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [line["outcome"] for line in lines] == ["passed", "passed", "wrong", "compile_error", "error", "crash"]
    assert [line["passed"] for line in lines] == [True, True, False, False, False, False]
    assert lines[4]["detail"] == "OSError: 1"
    assert found["pass@1"]["value"] == pytest.approx(2 / 6)
    assert found == json.loads((tmp_path / "out" / "summary.json").read_text())
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["files"] == {
        name: sha256_file(tmp_path / "out" / name) for name in ("results.jsonl", "summary.json")
    }


def test_scoring_twice_writes_the_same_bytes_whatever_the_workers(data, tmp_path):
    samples = save_samples(tmp_path / "samples.jsonl", MIXED)
    for workers in (1, 3):
        score(samples, "humaneval", tmp_path / f"{workers}", run_generated_code=True, data=data, workers=workers)
    assert files(tmp_path / "1") == files(tmp_path / "3")


def test_an_interrupted_scoring_goes_on_to_the_same_bytes(data, tmp_path):
    samples = save_samples(tmp_path / "samples.jsonl", MIXED)
    arguments = {"run_generated_code": True, "data": data, "workers": 1}
    score(samples, "humaneval", tmp_path / "whole", **arguments)

    def stop(_task, done, _total):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(samples, "humaneval", tmp_path / "cut", **arguments, progress=stop)
    partial = tmp_path / "cut.partial" / "results.jsonl"
    assert len(partial.read_text().splitlines()) == 3
    with partial.open("a") as file:
        file.write('{"task_id":"HumanEval/3","sam')  # what a kill in the middle of a write leaves
    seen = []
    score(samples, "humaneval", tmp_path / "cut", **arguments, progress=lambda _, done, total: seen.append(done))
    assert seen == [3, 4, 5, 6]
    assert files(tmp_path / "cut") == files(tmp_path / "whole")
    assert not (tmp_path / "cut.partial").exists()


def test_work_begun_on_other_samples_is_not_gone_on_with(data, tmp_path):
    samples = save_samples(tmp_path / "samples.jsonl", MIXED)

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(samples, "humaneval", tmp_path / "out", run_generated_code=True, data=data, progress=stop)
    other = save_samples(tmp_path / "other.jsonl", RIGHT)
    with pytest.raises(ConfigError, match="samples_sha256"):
        score(other, "humaneval", tmp_path / "out", run_generated_code=True, data=data)


def test_several_answers_to_a_problem_are_told_apart(data, tmp_path):
    answers = [(0, RIGHT[0][1]), (0, "    return 0\n"), (1, RIGHT[1][1]), (1, RIGHT[1][1])]
    samples = save_samples(tmp_path / "samples.jsonl", answers)
    found = score(samples, "humaneval", tmp_path / "out", run_generated_code=True, data=data)
    assert (found["problems"], found["problems_of_task"], found["samples"]) == (2, 6, 4)
    assert found["pass@1"]["value"] == pytest.approx(0.75)
    lines = (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    assert [json.loads(line)["sample"] for line in lines] == [0, 1, 0, 1]


def test_nothing_runs_unless_it_is_allowed(data, tmp_path, monkeypatch):
    samples = save_samples(tmp_path / "samples.jsonl", RIGHT)
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("something was started"))
    with pytest.raises(ConfigError, match="--run-generated-code"):
        score(samples, "humaneval", tmp_path / "out", data=data)
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("missing", ["bwrap", "prlimit"])
def test_without_a_sandbox_nothing_runs(data, tmp_path, monkeypatch, missing):
    samples = save_samples(tmp_path / "samples.jsonl", RIGHT)
    which = shutil.which
    monkeypatch.setattr("shutil.which", lambda name: None if name == missing else which(name))
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("something was started"))
    with pytest.raises(SandboxError, match="not installed"):
        score(samples, "humaneval", tmp_path / "out", run_generated_code=True, data=data)


def test_a_sandbox_that_cannot_be_set_up_is_found_at_once(tmp_path, monkeypatch):
    broken = tmp_path / "bwrap"
    broken.write_text("#!/bin/sh\necho 'bwrap: setting up uid map: Permission denied' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr("secateur.evaluation.sandbox.box.bubblewrap", lambda: str(broken))
    with pytest.raises(SandboxError, match="Permission denied"):
        Sandbox()


@pytest.mark.parametrize("language", HONEST)
def test_without_a_sandbox_programs_of_each_language_run_too(language, toolchain_of):
    code, checks = HONEST[language]
    for index, outcome in (("2", "passed"), ("1", "wrong")):
        program = Program(language, code.replace("{index}", index), checks)
        assert check(program, toolchain_of(language), Unconfined(), scale=2).outcome == outcome


def test_a_toolchain_that_tells_nothing_apart_is_refused(sandbox, monkeypatch):
    tools = toolchain("python")
    check_toolchain(tools, sandbox)
    monkeypatch.setattr(type(tools), "job", lambda *_: Job(("/bin/true",)))
    with pytest.raises(SandboxError, match="ended as no_verdict"):
        check_toolchain(tools, sandbox)


def test_a_home_is_never_shown(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    (tmp_path / "me" / "node").mkdir(parents=True)
    assert outside_usr(tmp_path / "me" / "node", Path("/usr/lib")) == (tmp_path / "me" / "node",)
    for folder in (tmp_path / "me", tmp_path, Path("/")):
        with pytest.raises(SandboxError, match="your own files"):
            outside_usr(folder)


def test_sets_have_the_same_order_each_time(sandbox):
    program = Program("python", "x = list({'p', 'q', 'r', 's', 't'})\n", "raise ValueError(''.join(x))\n")
    assert len({check(program, toolchain("python"), sandbox).detail for _ in range(4)}) == 1


@pytest.mark.parametrize("language", HONEST)
def test_half_a_surrogate_is_no_program(language, sandbox, toolchain_of):
    code, checks = HONEST[language]
    program = Program(language, code.replace("{index}", "2") + "\ud800", checks)
    assert check(program, toolchain_of(language), sandbox, scale=2).outcome != "passed"


def test_what_ends_at_a_limit_has_no_detail(sandbox):
    program = Program("python", "import sys\nn = 0\nwhile True:\n    n += 1\n    print(n, file=sys.stderr)\n", "")
    verdict = check(program, toolchain("python"), sandbox, scale=0.2)
    assert (verdict.outcome in ("timeout", "output"), verdict.detail) == (True, "")


def test_a_program_may_close_its_outputs(sandbox):
    program = Program("python", "import sys\nsys.stdout.close()\nsys.stderr = None\n", "assert True\n")
    assert check(program, toolchain("python"), sandbox).passed


@pytest.mark.parametrize("language", ["python", "javascript"])
def test_a_program_may_write_much_before_its_checks_hold(language, sandbox, toolchain_of):
    code = {"python": "print('x' * 9_000_000)", "javascript": "console.log('x'.repeat(9e6));"}[language]
    for _ in range(4):  # what waits in a pipe is a matter of chance
        assert check(Program(language, f"{code}\n", ""), toolchain_of(language), sandbox, scale=4).passed


def test_lines_end_at_line_feeds_alone(data, tmp_path):
    samples = save_samples(tmp_path / "samples.jsonl", [])
    with Journal(samples) as journal:
        journal.keep(0)
        journal.append([{"task_id": "HumanEval/0", "completion": "    return a + b  # \u2028 \x85 \ud800\n"}])
    found = score(samples, "humaneval", tmp_path / "out", run_generated_code=True, data=data)
    assert found["samples"] == 1


@pytest.mark.parametrize("left", ["manifest.json.partial-1-x", "summary.json.partial-1-x"])
def test_half_written_files_are_no_hindrance(data, tmp_path, left):
    samples = save_samples(tmp_path / "samples.jsonl", RIGHT[:2])
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / left).write_text("{")
    score(samples, "humaneval", tmp_path / "out", run_generated_code=True, data=data)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "manifest.json",
        "results.jsonl",
        "summary.json",
    ]
    assert not list(tmp_path.glob("*.lock"))


def test_a_kill_before_the_last_step_is_gone_on_from(data, tmp_path, monkeypatch):
    samples = save_samples(tmp_path / "samples.jsonl", MIXED)
    score(samples, "humaneval", tmp_path / "whole", run_generated_code=True, data=data)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("pathlib.Path.rename", killed)
        with pytest.raises(KeyboardInterrupt):
            score(samples, "humaneval", tmp_path / "cut", run_generated_code=True, data=data)
    score(samples, "humaneval", tmp_path / "cut", run_generated_code=True, data=data)
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def test_a_full_disk_says_what_is_kept_and_how_it_goes_on(data, tmp_path, monkeypatch):
    samples = save_samples(tmp_path / "samples.jsonl", RIGHT)
    real = Journal.append

    def append(self, records):
        if len(self.records) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(self, records)

    with monkeypatch.context() as patched:
        patched.setattr(Journal, "append", append)
        with pytest.raises(OutputError, match=r"disk is full.*out.partial.*the same command"):
            score(samples, "humaneval", tmp_path / "out", run_generated_code=True, data=data)
    assert len((tmp_path / "out.partial" / "results.jsonl").read_text().splitlines()) == 2
    score(samples, "humaneval", tmp_path / "out", run_generated_code=True, data=data)


def test_answers_whose_sandbox_failed_are_run_again(data, tmp_path, monkeypatch):
    samples = save_samples(tmp_path / "samples.jsonl", RIGHT[:3])
    real, count = Scorer._run, []

    def run(self, sample):
        count.append(1)
        if len(count) == 2:
            return Verdict("sandbox_failure", "bwrap: no", 0.0)
        if len(count) == 3:
            raise KeyboardInterrupt
        return real(self, sample)

    monkeypatch.setattr(Scorer, "_run", run)
    options = {"run_generated_code": True, "data": data, "workers": 1}
    with pytest.raises(KeyboardInterrupt):
        score(samples, "humaneval", tmp_path / "out", **options)
    found = score(samples, "humaneval", tmp_path / "out", **options)
    assert found["outcomes"] == {"passed": 3}


def test_a_sandbox_that_fails_later_is_counted_apart(sandbox, monkeypatch):
    monkeypatch.setattr("secateur.evaluation.sandbox.box._namespaces", lambda: ["--no-such-option"])
    verdict = check(Program("python", "x = 1", "assert x == 1\n"), toolchain("python"), sandbox)
    assert verdict.outcome == "sandbox_failure"


def test_a_program_cannot_say_that_its_sandbox_failed(sandbox):
    code = "import os\nos.write(2, b'bwrap: no\\n')\nos._exit(1)\n"
    assert check(Program("python", code, ""), toolchain("python"), sandbox).outcome == "error"


def test_a_program_inherits_nothing_but_its_outputs(sandbox):
    found = sandbox.run(Job(("/bin/ls", "/proc/self/fd")))
    assert found.output.split()[:3] == ["0", "1", "2"]
    assert len(found.output.split()) == 4, "and the folder that ls reads"


def test_unsafe_runs_without_a_sandbox_and_keeps_limits():
    tools, runner = toolchain("python"), Unconfined()
    assert check(Program("python", "x = 1", "assert x == 1\n"), tools, runner).passed
    endless = Program("python", "while True: pass\n", "")
    assert check(endless, tools, runner, scale=0.2).outcome == "timeout"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("no json", "line 2: not JSON"),
        ("[1]", "line 2: expected an object"),
        ('{"task_id": "HumanEval/0"}', "line 2: task_id and completion are strings"),
        ('{"task_id": "HumanEval/99", "completion": ""}', "no problem 'HumanEval/99'"),
    ],
)
def test_a_bad_line_of_samples_is_named(data, tmp_path, line, message):
    samples = save_samples(tmp_path / "samples.jsonl", RIGHT[:1])
    samples.write_text(samples.read_text() + line + "\n")
    with pytest.raises(ConfigError, match=message):
        score(samples, "humaneval", tmp_path / "out", run_generated_code=True, data=data)
    assert not (tmp_path / "out.partial").exists()


def test_what_is_there_is_kept(data, tmp_path):
    samples = save_samples(tmp_path / "samples.jsonl", RIGHT)
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="exists"):
        score(samples, "humaneval", tmp_path / "out", run_generated_code=True, data=data)


def test_a_journal_keeps_whole_lines_alone(tmp_path):
    path = tmp_path / "lines.jsonl"
    records = [{"text": "é\ud800\n", "n": 1}, {"text": "", "n": 2}]
    with Journal(path) as journal:
        journal.append(records)
    path.write_bytes(path.read_bytes() + encode({"n": 3})[:-1])
    with Journal(path) as journal:
        assert journal.records == records
        journal.append([{"n": 3}])
        journal.keep(2)
        journal.append([{"n": 4}])
    with Journal(path) as journal:
        assert journal.records == [*records, {"n": 4}]


def test_completions_are_run_whole_or_up_to_the_stop_strings(data, tmp_path):
    """A helper behind the function is part of an answer; a wrong line behind it is, too, unless it is cut off."""
    helped = "    return helper(a) + b\n\ndef helper(a):\n    return a\n"
    samples = save_samples(tmp_path / "samples.jsonl", [(0, helped), (1, RIGHT[1][1] + "\nassert add_1(1, 1) == 0\n")])
    outcomes = {}
    for cut in (False, True):
        score(samples, "humaneval", tmp_path / f"{cut}", run_generated_code=True, data=data, cut=cut)
        lines = (tmp_path / f"{cut}" / "results.jsonl").read_text().splitlines()
        outcomes[cut] = [json.loads(line)["outcome"] for line in lines]
    assert outcomes == {False: ["passed", "wrong"], True: ["error", "passed"]}


def test_results_of_other_answers_are_not_taken(data, sandbox, tmp_path):
    problems, tools = load_benchmark("humaneval", data).problems, toolchain("python")
    scorer = Scorer(problems, tools, sandbox, 1)
    wrong, right = ([Sample("HumanEval/0", 0, text)] for text in ("    return 0\n", RIGHT[0][1]))
    with Journal(tmp_path / "results.jsonl") as journal:
        for samples, outcome in ((wrong, "wrong"), (right, "passed")):
            scorer.score(samples, journal, lambda *_: None)
            assert [one["outcome"] for one in journal.records] == [outcome]


@pytest.mark.parametrize(("failures", "outcome"), [(1, "passed"), (2, "sandbox_failure")])
def test_what_could_not_be_run_is_tried_once_more(data, sandbox, tmp_path, monkeypatch, failures, outcome):
    calls = []

    def failing(program, *arguments, **options):
        calls.append(program.code)
        is_first = len({*calls}) == 2 and calls.count(program.code) <= failures
        return Verdict("sandbox_failure", "", 0.0) if is_first else check(program, *arguments, **options)

    monkeypatch.setattr("secateur.evaluation.programs.scoring.check", failing)
    scorer = Scorer(load_benchmark("humaneval", data).problems, toolchain("python"), sandbox, 1)
    samples = [Sample(f"HumanEval/{number}", 0, text) for number, text in RIGHT[:3]]
    with Journal(tmp_path / "results.jsonl") as journal:
        scorer.score(samples, journal, lambda *_: None)
        assert [one["outcome"] for one in journal.records] == ["passed", outcome, "passed"]
    assert len(calls) == 4


def test_shared_folders_of_a_home_are_not_shown(monkeypatch, tmp_path):
    monkeypatch.setattr("pathlib.Path.home", lambda: tmp_path)
    for folder in (tmp_path / ".nvm" / "versions" / "v20", tmp_path / ".jdk"):
        assert outside_usr(folder) == (folder,)
    for folder in (tmp_path, tmp_path.parent, tmp_path / ".local", tmp_path / ".local" / "share"):
        with pytest.raises(SandboxError, match="your own files"):
            outside_usr(folder)


def test_answers_in_code_blocks_are_told(data, tmp_path):
    samples = save_samples(tmp_path / "samples.jsonl", [(0, "```python\n    return 1\n```"), RIGHT[1]])
    found = score(samples, "humaneval", tmp_path / "out", run_generated_code=True, data=data)
    assert found["in_code_blocks"] == 1
    assert "1 begin with a code block" in render(found)
    assert "code block" not in render({key: one for key, one in found.items() if key != "in_code_blocks"})


FOREVER = "template<int N, int M> struct A { A<N-1, 2*M> a; A<N-1, 2*M+1> b; }; template<int M> struct A<0, M> {};\n"
HUGE = "#define A(x) x x x x x x x x x x\n#define B(x) A(A(A(A(A(A(A(x)))))))\n"


@pytest.mark.parametrize(
    ("language", "code", "outcome"),
    [
        ("python", "x = [0] * (1 << 40)\n", "memory"),
        ("javascript", "const a = []; while (true) a.push(new Array(1e6).fill(1.5));", "memory"),
        ("javascript", "const a = []; while (true) a.push(new ArrayBuffer(1e8));", "memory"),
        ("javascript", "new Array(-1)", "error"),
        ("cpp", "long f() { std::vector<long> a; while (true) a.push_back(1);", "memory"),
        ("cpp", "long f() { long n = -5; return (new long[n])[0];", "crash"),
        ("cpp", f"{HUGE}long f() {{ B(1;) return 0;", "memory"),
        ("cpp", "long f() { return 0;", "passed"),
        (
            "java",
            "import java.util.*; class Problem { static long f() {"
            " List<long[]> a = new ArrayList<>(); while (true) a.add(new long[1000000]);",
            "memory",
        ),
        (
            "java",
            "import java.util.*; class Problem { static List<Object> a = new LinkedList<>(); static long f() {"
            " while (true) a.add(new Object());",
            "memory",
        ),
        (
            "java",
            "class Problem { static long[][] a = new long[5000][1000000]; static long f() { return 0;",
            "memory",
        ),
        (
            "java",
            "class Problem { static int zero() { return 0; } static int a = 1 / zero(); static long f() { return 0;",
            "error",
        ),
        ("python", f"x = {'-' * 8000}1\n", "compile_error"),
    ],
)
def test_memory_that_is_not_to_be_had_is_counted_apart(sandbox, toolchain_of, language, code, outcome):
    checks = {
        "cpp": "}\nint main() { assert(f() == 0);\n}\n",
        "java": "}\npublic static void main(String[] x) { assert(f() == 0); } }\n",
    }
    program = Program(language, code, checks.get(language, ""))
    assert check(program, toolchain_of(language), sandbox, scale=4).outcome == outcome


def test_a_compiler_that_takes_too_long_is_a_timeout(sandbox, toolchain_of):
    program = Program("cpp", f"{FOREVER}long f() {{ A<24, 1> a; return 0;", "}\nint main() {\n}\n")
    assert check(program, toolchain_of("cpp"), sandbox, scale=0.05).outcome == "timeout"
