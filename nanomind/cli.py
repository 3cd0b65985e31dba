"""Turns a `main()` into a command: what a user did wrong becomes one line on stderr, never a traceback.
In: a function without arguments that may raise ValueError or OSError. Out: the exit code (0 fine, 2 user error, 130 Ctrl-C).
Next: nanomind/config.py
"""

import argparse
import difflib
import os
import re
import sys
import traceback


# glibc gives big blocks back to the kernel after every step and takes them again, page fault by page fault. Kept, a step is a fifth to a
# third faster. The settings are read when a process starts, so a command sets them and starts itself again.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "8589934592", "MALLOC_TOP_PAD_": "268435456"}


def keep_memory(command=None):
    """Start this command again with the allocator's settings above (Linux only; once). command: what to run when it is not a script."""
    if sys.platform == "linux" and not set(ALLOCATOR) & set(os.environ):
        os.execve(sys.executable, [sys.executable, *(command + sys.argv[1:] if command else sys.argv)], {**os.environ, **ALLOCATOR})


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is one line instead of a page of usage, and a mistyped flag is named together with the one that was meant."""

    def parse_known_args(self, args=None, namespace=None):
        self.words = sys.argv[1:] if args is None else list(args)
        found, rest = super().parse_known_args(args, namespace)
        if rest:
            self.error(f"what is {' '.join(rest)}?")
        return found, rest

    def error(self, message):
        known = [flag for action in self._actions for flag in action.option_strings]
        wrong = [word.split("=")[0] for word in self.words if re.match("--[a-z]", word) and word.split("=")[0] not in known]
        if wrong and not self._subparsers:  # said first: a mistyped --out is also a missing --out
            near = {flag: difflib.get_close_matches(flag, known, 1) for flag in wrong}
            message = "there is no " + ", ".join(flag + (f" (perhaps {near[flag][0]})" if near[flag] else "") for flag in wrong)
        self.exit(2, f"error: {message}; {self.prog} --help lists what there is\n")


def run(main):
    """Run `main()` and exit. Set NANOMIND_DEBUG=1 to see the traceback behind a one-line error."""
    for stream in (sys.stdout, sys.stderr):  # a terminal or file that cannot show Chinese must not end an hour of training
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        code = main()
    except KeyboardInterrupt:
        print("\nstopped by Ctrl-C", file=sys.stderr)
        code = 130
    except BrokenPipeError:  # `| head` closed our output: nobody is left to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except (ValueError, OSError) as problem:
        if os.environ.get("NANOMIND_DEBUG"):
            raise
        if isinstance(problem, OSError) and problem.strerror:  # say "No space left on device", not "[Errno 28] ..."
            problem = f"{problem.filename or 'write'}: {problem.strerror}"
        print(f"error: {problem}", file=sys.stderr)
        code = 2
    except Exception:
        if "LOCAL_RANK" not in os.environ:
            raise
        traceback.print_exc()
        code = 1
    if "LOCAL_RANK" in os.environ:  # one of torchrun's processes: gloo's threads let go of their last tensors a little later than the group is
        # destroyed, and an interpreter that shuts down under them aborts the process (and with it the run); so it is not shut down
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)
    sys.exit(code)
