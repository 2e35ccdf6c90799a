"""A benchmark in the format of HumanEval, and a program in each language, small enough to be written down."""

import json
from pathlib import Path

RECORDS = [
    {
        "task_id": f"HumanEval/{number}",
        "prompt": f'def add_{number}(a, b):\n    """Return a + b + {number}."""\n',
        "entry_point": f"add_{number}",
        "canonical_solution": f"    return a + b + {number}\n",
        "test": f"def check(f):\n    assert f(1, 2) == {3 + number}\n    assert f(0, 0) == {number}\n",
    }
    for number in range(6)
]

# By language: a program, in which an index is left open (2 is right), and its checks.
HONEST = {
    "java": (
        "import java.util.*;\nimport org.javatuples.*;\nclass Problem {\n"
        "    public static Pair<Long, Long> ends(ArrayList<Long> a) {\n"
        "        return Pair.with(a.get(0), a.get({index}));\n",
        "    }\n    public static void main(String[] args) {\n"
        "        assert(ends(new ArrayList<Long>(Arrays.asList(1l, 2l, 3l))).equals(Pair.with(1l, 3l)));\n    }\n}\n",
    ),
    "cpp": (
        "#include<assert.h>\n#include<bits/stdc++.h>\nlong last(std::vector<long> a) {\n    return a[{index}];",
        "}\nint main() {\n    auto candidate = last;\n    assert(candidate({1, 2, 3}) == (3));\n}\n",
    ),
    "javascript": (
        "//The last entry.\nfunction last(a) {\n  return [a[{index}]];\n}",
        "const assert = require('node:assert');\n"
        "function test() {\n  assert.deepEqual(last([1, 2, 3]), [3]);\n}\ntest();",
    ),
    "python": ("def last(a):\n    return a[{index}]\n", "assert last([1, 2, 3]) == 3\n"),
}


def save_mini(folder: Path) -> Path:
    """Write it into a data folder; return the folder."""
    place = folder / "benchmarks" / "humaneval"
    place.mkdir(parents=True)
    (place / "HumanEval.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return folder


def save_samples(path: Path, completions: list[tuple[int, str]]) -> Path:
    """Write answers (number of the problem, completion); return the file."""
    lines = [json.dumps({"task_id": f"HumanEval/{number}", "completion": text}) for number, text in completions]
    path.write_text("\n".join(lines) + "\n")
    return path
