"""In C++."""

from tests.evaluation.programs.hostile import FAILED, WRONG, Hostile

_ATTEMPT = "int main() {\n    assert(attempt() == true);\n}\n"
_HONEST = "int main() {\n    assert(answer(20) == 42);\n}\n"
_INCLUDES = """
#include <assert.h>
#include <bits/stdc++.h>
#include <arpa/inet.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>
"""


def _tries(name: str, code: str, outcomes: tuple[str, ...] = FAILED) -> Hostile:
    return Hostile(name, "cpp", _INCLUDES + code, outcomes, _ATTEMPT)


def _forges(name: str, code: str, outcomes: tuple[str, ...]) -> Hostile:
    return Hostile(name, "cpp", _INCLUDES + code, outcomes, _HONEST)


PROGRAMS = (
    _tries("read a secret", 'bool attempt() { std::ifstream f("{secret}"); std::string s; f >> s; return s == "SECRET"; }', WRONG),
    _tries("read a secret while compiling", 'bool attempt() {\n#include "{secret}"\nreturn true; }', ("compile_error",)),
    _tries("compile without end", '#include "/dev/full"\nbool attempt() { return true; }', ("compile_error", "timeout", "memory")),
    _tries(
        "compile a bomb",
        "template <int N> struct B { static constexpr long v = B<N - 1>::v + B<N - 2>::v; };\n"
        "constexpr long loop(long n) { long s = 0; for (long i = 0; i < n; i++) s += i % 7; return s; }\n"
        "constexpr long x = loop(1L << 40);\nbool attempt() { return x; }",
        ("compile_error", "timeout"),
    ),
    _tries("write outside", 'bool attempt() { std::ofstream f("{folder}/mark"); f << "x"; f.close(); return f.good(); }', WRONG),
    _tries(
        "connect to a listener on loopback",
        """
bool attempt() {
    sockaddr_in to{}; to.sin_family = AF_INET; to.sin_port = htons({port}); to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    return connect(socket(AF_INET, SOCK_STREAM, 0), (sockaddr *)&to, sizeof to) == 0;
}
""",
        WRONG,
    ),
    _tries("send a signal to another process", "bool attempt() { return kill({pid}, SIGTERM) == 0; }", WRONG),
    _tries(
        "start many processes",
        "bool attempt() { for (int i = 0; i < 300; i++) { pid_t p = fork(); if (p < 0) return false; if (!p) { sleep(5); _exit(0); } } return true; }",
        WRONG,
    ),
    _tries(
        "allocate 2 GiB",
        "bool attempt() { std::vector<std::string> all; for (int i = 0; i < 32; i++) all.emplace_back(64 << 20, 'x'); return true; }",
        ("crash", "memory"),
    ),
    _tries("run a shell", 'bool attempt() { return system("cat {secret} && kill {pid}") == 0; }', WRONG),
    _tries("loop", "bool attempt() { time_t end = time(nullptr) + 100; while (time(nullptr) < end); return true; }", ("timeout",)),
    _tries("write without end", "bool attempt() { std::string s(65536, 'x'); for (int i = 0; i < 1024; i++) std::cout << s; return true; }", ("output",)),
    _tries("follow no pointer", "bool attempt() { return *(volatile int *)8 == 0; }", ("crash",)),
    _forges("exit 0 before main", "struct Early { Early() { _exit(0); } } early;\nint answer(int) { return 41; }", ("no_verdict",)),
    _forges("exit 0 in the answer", "int answer(int) { std::quick_exit(0); }", ("no_verdict",)),
    _forges("replace assert", "#undef assert\n#define assert(x)\n#define NDEBUG\nint answer(int) { return 41; }", WRONG),
    _forges("a main of its own", "int answer(int) { return 41; }\nint main() { return 0; }\n#define main other", ("compile_error",)),
    _forges("print what success prints", 'int answer(int) { puts("passed"); fflush(stdout); _exit(0); }', ("no_verdict",)),
    _forges(
        "look for the token in the source",
        'int answer(int) { std::ifstream f("main.cpp"); std::cout << f.rdbuf() << std::flush; _exit(0); }',
        ("no_verdict",),
    ),
)  # fmt: skip
