import java.lang.reflect.InvocationTargetException;
import java.lang.reflect.Method;
import java.net.URL;
import java.net.URLClassLoader;
import java.nio.charset.StandardCharsets;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.List;
import javax.tools.JavaCompiler;
import javax.tools.ToolProvider;

/** Compiles and runs a program with its checks, and says the token of standard input if all of them held. */
public final class Driver {
    /** Arguments: the source file, the class whose main method has the checks, and a folder with libraries. */
    public static void main(String[] arguments) throws Exception {
        String token = new String(System.in.readAllBytes(), StandardCharsets.UTF_8);
        Path classes = Path.of(arguments[0]).toAbsolutePath().getParent();
        List<String> options = new ArrayList<>(List.of(
            "-proc:none", "-nowarn", "-encoding", "UTF-8", "-Xlint:none", "-g:none",
            "-d", classes.toString(), "-cp", arguments[2], arguments[0]));
        JavaCompiler compiler = ToolProvider.getSystemJavaCompiler();
        if (compiler.run(null, System.err, System.err, options.toArray(new String[0])) != 0) {
            leave(96);
        }
        URL[] places = {classes.toUri().toURL(), Path.of(arguments[2]).toUri().toURL()};
        java.io.PrintStream out = System.out;
        try (URLClassLoader loader = new URLClassLoader(places, ClassLoader.getPlatformClassLoader())) {
            loader.setDefaultAssertionStatus(true);
            Method checks = loader.loadClass(arguments[1]).getDeclaredMethod("main", String[].class);
            checks.setAccessible(true);
            checks.invoke(null, (Object) new String[0]);
        } catch (InvocationTargetException error) {
            fail(error.getCause());
        } catch (Throwable error) {  // of a static initialiser, too
            fail(error);
        }
        System.out.flush();
        out.print("\n" + token + "\n");
        out.flush();
        leave(0);
    }

    private static void fail(Throwable error) {
        Throwable cause = error instanceof ExceptionInInitializerError && error.getCause() != null
            ? error.getCause() : error;
        int code = cause instanceof AssertionError ? 97 : withoutMemory(cause) ? 95 : 1;
        try {
            cause.printStackTrace();
        } catch (Throwable again) {
            // What has no memory left cannot be printed.
        }
        leave(code);
    }

    /** The same error is raised where one thread more is refused. */
    private static boolean withoutMemory(Throwable cause) {
        return cause instanceof OutOfMemoryError && !String.valueOf(cause.getMessage()).contains("native thread");
    }

    private static void leave(int code) {
        System.err.flush();
        Runtime.getRuntime().halt(code);
    }
}
