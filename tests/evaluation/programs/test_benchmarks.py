"""The benchmarks: their files, and programs of each language."""

import json

import pytest

from secateur.errors import CorpusError, UnknownNameError
from secateur.evaluation.programs.benchmarks import BENCHMARKS, mbpp, multipl_e
from secateur.evaluation.programs.checking import check
from secateur.evaluation.programs.languages import toolchain
from secateur.evaluation.programs.loading import load_benchmark
from secateur.evaluation.programs.program import Program
from secateur.evaluation.programs.score import score
from tests.evaluation.programs.mini import HONEST

pytestmark = pytest.mark.usefixtures("sandbox")


def test_unknown_and_missing_benchmarks(data, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(UnknownNameError, match="humaneval"):
        load_benchmark("humanevil", data)
    with pytest.raises(CorpusError, match=r"mbpp.jsonl.*--data"):
        load_benchmark("mbpp", data)
    (data / "benchmarks" / "humaneval" / "HumanEval.jsonl").write_text('{"task_id": 1}\n')
    with pytest.raises(CorpusError, match="no problems of humaneval"):
        load_benchmark("humaneval", data)


@pytest.mark.parametrize("answer", [None, "    return None\n"])
def test_the_solutions_of_humaneval_pass_and_others_do_not(answer, sandbox):
    loaded, tools = load_benchmark("humaneval", None), toolchain("python")
    problems = list(loaded.problems.values())
    assert len(problems) == 164
    passed = [check(one.program(answer or one.solution), tools, sandbox, scale=2).passed for one in problems]
    assert passed == [answer is None] * len(problems)


@pytest.mark.parametrize("language", HONEST)
@pytest.mark.parametrize(("index", "outcome"), [("2", "passed"), ("1", "wrong"), ("2 +", "compile_error")])
def test_programs_of_each_language(language, index, outcome, sandbox, toolchain_of):
    code, checks = HONEST[language]
    program = Program(language, code.replace("{index}", index), checks)
    assert check(program, toolchain_of(language), sandbox, scale=2).outcome == outcome


def test_every_benchmark_has_a_language_that_can_be_run():
    assert {one.language for one in BENCHMARKS.values()} == {"python", "java", "cpp", "javascript"}


@pytest.mark.parametrize("family", ["multipl-e", "multipl-e-mbpp"])
@pytest.mark.parametrize(("language", "short"), [("javascript", "js"), ("java", "java"), ("cpp", "cpp")])
def test_records_of_multipl_e_are_run_in_their_language(family, language, short, tmp_path):
    head, checks = HONEST[language]
    begin, _, answer = head.partition("return ")
    name = f"{'mbpp' if 'mbpp' in family else 'HumanEval'}_3_last"
    record = {"name": name, "language": short, "prompt": begin, "tests": checks, "stop_tokens": ["\n//"]}
    place = tmp_path / "data" / "benchmarks" / "multipl_e"
    place.mkdir(parents=True)
    file = f"{'mbpp' if 'mbpp' in family else 'humaneval'}-{short}.jsonl"
    (place / file).write_text(json.dumps(record) + "\n")
    answers = [answer.replace("{index}", index) for index in ("2", "0")]
    lines = [json.dumps({"task_id": name, "sample": n, "completion": f"return {one}"}) for n, one in enumerate(answers)]
    (tmp_path / "samples.jsonl").write_text("\n".join(lines) + "\n")
    task = f"{family}:{language}"
    found = score(tmp_path / "samples.jsonl", task, tmp_path / "out", run_generated_code=True, data=tmp_path / "data")
    assert found["pass@1"]["value"] == 0.5
    outcomes = [json.loads(one)["outcome"] for one in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert outcomes == ["passed", "wrong"]
    assert load_benchmark(task, tmp_path / "data").problems[name].stop == ("\n//",)


CPP_X = {
    "task_id": "CPP/0",
    "prompt": "#include<vector>\nusing namespace std;\nint last(vector<int> a){\n",
    "declaration": "int last(vector<int> a){\n",
    "canonical_solution": "    return a.back();\n}\n\n",
    "test": "#undef NDEBUG\n#include<assert.h>\nint main(){\n    assert (last({1, 2}) == 2);\n}\n",
}
JAVA_X = {
    "task_id": "Java/0",
    "prompt": "import java.util.*;\n\nclass Solution {\n    public int last(List<Integer> a) {\n",
    "declaration": "    public int last(List<Integer> a) {\n",
    "canonical_solution": "        return a.get(a.size() - 1);\n    }\n}",
    "test": "public class Main {\n    public static void main(String[] args) {\n        Solution s = new Solution();\n"
    "        if (s.last(Arrays.asList(1, 2)) != 2) throw new AssertionError();\n    }\n}\n",
}
JAVA_MAIN = "    public static void main(String[] args) {\n        System.out.println(1);\n    }\n}"


@pytest.mark.parametrize(
    ("record", "language", "answer", "outcome"),
    [
        (CPP_X, "cpp", None, "passed"),
        (CPP_X, "cpp", "    return a[0];\n}\n", "wrong"),
        (JAVA_X, "java", None, "passed"),
        (JAVA_X, "java", "        return a.get(1);\n    }\n\n" + JAVA_MAIN, "passed"),
        (JAVA_X, "java", "        return a.get(0);\n    }\n}", "wrong"),
    ],
)
def test_records_of_humaneval_x(record, language, answer, outcome, sandbox, toolchain_of):
    (problem,) = multipl_e(language)([record])
    program = problem.program(problem.cut(answer or problem.solution))
    assert check(program, toolchain_of(language), sandbox, scale=2).outcome == outcome


def test_the_hub_comes_last(data, monkeypatch):
    asked = []
    record = {
        "task_id": 11, "text": "Add.", "code": "def add(a, b):\r\n    return a + b",
        "test_list": ["assert add(1, 2) == 3"], "test_setup_code": "", "challenge_test_list": [],
    }  # fmt: skip

    def load_dataset(*name, **settings):
        asked.append((*name, settings))
        return [record]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert load_benchmark("humaneval", data).source.startswith(str(data))
    assert asked == []
    loaded = load_benchmark("mbpp", data)
    assert asked == [("google-research-datasets/mbpp", "full", {"split": "test"})]
    assert list(loaded.problems) == ["MBPP/11"]
    assert loaded.source == "hub: google-research-datasets/mbpp full"
    with pytest.raises(CorpusError, match="no problems of multipl-e:python were found"):
        load_benchmark("multipl-e:python", data)
    assert len(asked) == 1


def test_a_hub_that_gives_nothing_is_told(data, monkeypatch):
    def load_dataset(*_, **__):
        raise ConnectionError("no way")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(CorpusError, match=r"tried .*the hub: ConnectionError.*--data"):
        load_benchmark("mbpp", data)
    monkeypatch.setattr("secateur.evaluation.programs.loading.find_spec", lambda _: None)
    with pytest.raises(CorpusError, match="pip install 'secateur"):
        load_benchmark("mbpp", data)


def test_a_chat_model_writes_all_of_a_program_of_mbpp(sandbox):
    record = {
        "task_id": 11, "text": "Write a function to halve.",
        "test_list": ["assert half(4) == 2", "assert half(2) == 1"],
        "test_setup_code": "", "code": "def half(x):\r\n  return x / 2",
    }  # fmt: skip
    (problem,) = mbpp([record])
    assert problem.question() == (
        "Write a function to halve.\nThese tests have to pass:\n\n```python\nassert half(4) == 2\nassert half(2) == 1\n"
        "```\n\nReply with the whole code in one code block."
    )
    assert problem.reply() == "```python\n"
    answer = problem.cut("def half(x):\n    return x / 2\n\nassert half(4) == 2\n```\nIt halves.")
    assert answer == "def half(x):\n    return x / 2\n"
    assert check(problem.program(answer), toolchain("python"), sandbox, scale=2).passed
    assert not check(problem.program(""), toolchain("python"), sandbox, scale=2).passed
