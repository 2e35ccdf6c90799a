"""In Java."""

from tests.evaluation.programs.hostile import FAILED, WRONG, Hostile

_ATTEMPT = "\n    public static void main(String[] arguments) throws Exception {\n        assert(attempt() == true);\n    }\n}\n"
_HONEST = "\n    public static void main(String[] arguments) throws Exception {\n        assert(answer(20) == 42);\n    }\n}\n"
_HEAD = """
import java.io.*;
import java.net.*;
import java.nio.file.*;
import java.util.*;
class Problem {
"""


def _tries(name: str, body: str, outcomes: tuple[str, ...] = FAILED) -> Hostile:
    return Hostile(
        name, "java", f"{_HEAD}    static boolean attempt() throws Exception {{ {body} }}", outcomes, _ATTEMPT
    )


def _forges(name: str, code: str, outcomes: tuple[str, ...]) -> Hostile:
    return Hostile(name, "java", _HEAD + code, outcomes, _HONEST)


PROGRAMS = (
    _tries("read a secret", 'return Files.readString(Path.of("{secret}")).contains("SECRET");'),
    _tries("read the environment", 'return System.getenv().toString().contains("SECRET");', WRONG),
    _tries("write outside", 'Files.writeString(Path.of("{folder}/mark"), "x"); return true;'),
    _tries("connect to a listener on loopback", 'new Socket("127.0.0.1", {port}).close(); return true;'),
    _tries(
        "start many threads",
        "for (int i = 0; i < 300; i++) { Thread t = new Thread(() -> { try { Thread.sleep(5000); } catch (InterruptedException e) {} }); "
        "t.setDaemon(true); t.start(); } return true;",
        ("wrong", "error", "crash"),
    ),
    _tries(
        "allocate 2 GiB",
        "List<byte[]> all = new ArrayList<>(); for (int i = 0; i < 32; i++) all.add(new byte[64 << 20]); return true;",
        ("memory",),
    ),
    _tries(
        "allocate 2 GiB outside the heap",
        "List<Object> all = new ArrayList<>(); for (int i = 0; i < 32; i++) { var b = java.nio.ByteBuffer.allocateDirect(64 << 20); "
        "for (int j = 0; j < b.capacity(); j += 4096) b.put(j, (byte) 1); all.add(b); } return true;",
        ("error", "memory"),
    ),
    _tries("run a command", 'return new ProcessBuilder("/bin/kill", "{pid}").start().waitFor() == 0;', WRONG),
    _tries("loop", "long end = System.currentTimeMillis() + 100000; while (System.currentTimeMillis() < end); return true;", ("timeout",)),
    _tries("write without end", 'String s = "x".repeat(65536); for (int i = 0; i < 1024; i++) System.out.print(s); return true;', ("output",)),
    _forges("exit 0 early", "    static { System.exit(0); }\n    static int answer(int x) { return 41; }", ("no_verdict",)),
    _forges("halt", "    static int answer(int x) { Runtime.getRuntime().halt(0); return 41; }", ("no_verdict",)),
    _forges(
        "turn assertions off",
        "    static { Problem.class.getClassLoader().setDefaultAssertionStatus(false); Problem.class.getClassLoader().clearAssertionStatus(); }\n"
        "    static int answer(int x) { return 41; }",
        WRONG,
    ),
    _forges(
        "replace the outputs",
        "    static int answer(int x) { System.setErr(new PrintStream(OutputStream.nullOutputStream())); System.out.close(); return 41; }",
        WRONG,
    ),
    _forges(
        "call the driver again",
        '    static int answer(int x) throws Exception { Class.forName("Driver").getMethod("main", String[].class)'
        '.invoke(null, (Object) new String[]{"Problem.java", "Problem", "."}); return 41; }',
        (*FAILED, "no_verdict", "compile_error", "timeout"),
    ),
    _forges(
        "look for the token in arguments",
        '    static int answer(int x) { System.out.println(System.getProperties() + ProcessHandle.current().info().toString()); System.exit(0); return 41; }',
        ("no_verdict",),
    ),
)  # fmt: skip
