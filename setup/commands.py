"""The commands of run.py, from argument to exit status."""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from . import SetupError, demo
from .hosts import ROOT, Host, check_given, given_host
from .install import Setup, default_home, make_folder
from .server import PACK, Server, is_free

TIERS = ("ops", "host", "server", "browser")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
NO_TESTS = 5  # pytest's exit status where nothing was collected
IN_PARTS = ("binding", "filter", "lab", "localize", "maps", "regional", "residual", "sliders", "steer")  # benchmarks with --again
MOST_WORKERS = 4  # test processes; each of them may hold a host of 2 GB


def run(arguments: list[str]) -> int:
    """Run one command line; its exit status. What the user can put right is said in one line, below the end of the log that shows it."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that a server started here is stopped
    options = parse(arguments or ["--help"])
    try:
        return options.command(options) or 0
    except SetupError as error:
        if error.detail:
            print(error.detail, file=sys.stderr)
        print(f"run.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return 130


def parse(arguments: list[str]) -> argparse.Namespace:
    passed_on = arguments[arguments.index("--") + 1 :] if "--" in arguments else []
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    parser = argparse.ArgumentParser(prog="run.py", description="Sets up what is missing, then runs one command.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name, function, help):
        command = commands.add_parser(name, help=help)
        command.set_defaults(command=function, passed_on=passed_on)
        return command

    def add_device(command):
        command.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where models run (default: cpu)")

    made = add("demo", run_demo, "make pictures with a slider at five strengths, and a contact sheet")
    made.add_argument("--output", type=Path, default=Path("demo_output"), help="folder for the pictures (default: ./demo_output)")
    add_device(made)
    tested = add("test", run_tests, "run the tests and the linters; what follows -- goes to pytest")
    tested.add_argument("tiers", nargs="*", metavar="TIER", help=f"{', '.join(TIERS)} (default: all)")
    tested.add_argument("--require", action="append", default=[], choices=TIERS, help="fail where this tier cannot run")
    add_device(tested)
    benched = add("bench", run_benchmark, "run a benchmark")
    benched.add_argument("name", metavar="NAME")
    benched.add_argument("--check", action="store_true", help="re-run a random sample of the committed result")
    benched.add_argument("--size", choices=("sdxl", "flux"), help="regional: time a model of this published size (needs --device cuda)")
    benched.add_argument(
        "--ours", action="store_true", help="sliders: the shipped sliders alone; filter, with --again: the arms of ours alone"
    )
    benched.add_argument(
        "--released", type=Path, metavar="CHECKOUT", help="sliders: the released trainer too, from a clone of its repository"
    )
    benched.add_argument("--again", nargs="+", metavar="PART", default=[], help=f"{', '.join(IN_PARTS)}: measure these parts alone anew")
    add_device(benched)
    served = add("serve", run_server, "run ComfyUI with this pack for your browser")
    served.add_argument("--port", type=int, default=8188)
    add_device(served)
    add_device(add("families", list_families, "print which model families each capability works on"))
    lab = add("lab", run_lab, "train and measure the lab models (lab --help lists how)")
    lab.add_argument("arguments", nargs=argparse.REMAINDER)
    if own[:1] == ["lab"]:  # everything after it belongs to the lab, its --help included
        return argparse.Namespace(command=run_lab, arguments=own[1:] + passed_on)
    return parser.parse_args(own)


# --- what every command starts with -----------------------------------------------------------------------------------------------


class Ready:
    """A host to run things in: the user's own or the private one, set up as far as it was missing."""

    def __init__(self, tools=False):
        self.home = default_home()
        self.setup = Setup(self.home)
        self.host = own_host() or self.setup.private_host(tools)
        make_folder(self.home)
        self.variables = self.host.environment(self.home)
        if tools and not self.host.private:
            self.variables["CONCEPT_NODES_TOOLS"] = str(self.setup.tools_for(self.host))

    def base(self, name) -> Path:
        """A folder of ours that takes the place of the host's own."""
        folder = self.home / "bases" / name
        make_folder(folder)
        return folder

    def inside(self, module, *arguments, device="cpu", variables=None) -> int:
        """Run a module of the pack (or of its tools) in the host's Python; its exit status."""
        settings = {"CONCEPT_NODES_BASE": str(self.base("inside")), "CONCEPT_NODES_DEVICE": device}
        command = [str(self.host.python), str(ROOT / "setup" / "inside.py"), module, *(str(part) for part in arguments)]
        return subprocess.run(command, env=self.variables | settings | (variables or {})).returncode


def own_host() -> Host | None:
    host = given_host()
    if host:
        print(f"Using the ComfyUI in {host.path} with {host.python}; nothing in it is changed.")
        check_given(host)
    return host


# --- commands ---------------------------------------------------------------------------------------------------------------------


def run_demo(options) -> int:
    folder = options.output.absolute()
    ready = Ready()
    demo.check_output(folder)
    demo.make_pictures(ready.host, ready.home, ready.variables, folder, options.device)
    return ready.inside("concept_nodes.lab.demo", folder, device=options.device)


def run_server(options) -> int:
    if not is_free(options.port):
        raise SetupError(f"Port {options.port} is taken: name another with --port.")
    ready = Ready()
    with Server(ready.host, ready.base("serve"), ready.variables, options.device, options.port) as server:
        example = f"{server.url}/?template=slider&source={PACK}"
        print(f"\nOpen {example} in a browser. Ctrl+C ends it. Files: {server.base}\n", flush=True)
        return server.wait()


def run_benchmark(options) -> int:
    names = sorted(path.stem for path in (ROOT / "benchmarks").glob("[!_]*.py"))
    if options.name not in names:
        raise SetupError(f"There is no benchmark {options.name!r}; there are: {', '.join(names) or 'none yet'}.")
    if options.size and options.name != "regional":
        raise SetupError(f"bench {options.name} has no --size; bench regional has.")
    if options.size and options.device == "cpu":
        raise SetupError(f"--size {options.size} times a model of the published size, which needs a GPU: add --device cuda.")
    for option, having in (("released", ("sliders",)), ("ours", ("filter", "sliders"))):
        if getattr(options, option) and options.name not in having:
            raise SetupError(
                f"bench {options.name} has no --{option}; bench {' and bench '.join(having)} {'have' if having[1:] else 'has'}."
            )
    if options.again and options.name not in IN_PARTS:
        raise SetupError(f"bench {options.name} has no --again; there are parts in: {', '.join(IN_PARTS)}.")
    passed = [*(["--check"] if options.check else []), *(["--size", options.size] if options.size else [])]
    passed += ["--ours"] * options.ours
    passed += ["--again", *options.again] if options.again else []
    passed += ["--released", str(options.released.absolute())] if options.released else []
    needs_tools = options.released is not None or (options.name == "filter" and not options.check)
    return Ready(tools=needs_tools).inside(f"concept_nodes.benchmarks.{options.name}", *passed, device=options.device)


def run_lab(options) -> int:
    device = device_of_lab(options.arguments)
    return Ready().inside("concept_nodes.lab.__main__", *options.arguments, device=device)


def device_of_lab(arguments: list[str]) -> str:
    """What the lab will read from its --device, which the host must know before the lab is loaded."""
    parser = argparse.ArgumentParser(prog="run.py lab", add_help=False)
    parser.add_argument("--device", default="cpu")
    return parser.parse_known_args(arguments)[0].device


def list_families(options) -> int:
    return Ready().inside("concept_nodes.setup.families", device=options.device)


# --- tests ------------------------------------------------------------------------------------------------------------------------


def run_tests(options) -> int:
    unknown = [tier for tier in options.tiers if tier not in TIERS]
    if unknown:
        raise SetupError(f"There is no test tier {unknown[0]!r}; there are: {', '.join(TIERS)}.")
    chosen = options.tiers or TIERS
    required = {*options.require, *os.environ.get("CONCEPT_NODES_REQUIRE", "").replace(",", " ").split()}
    ready = Ready(tools=True)
    total, left_out = Count(), []
    total += run_check(ready, "ruff", "check", "--output-format", "concise", ROOT)
    total += run_check(ready, "ruff", "format", "--check", ROOT)
    for tier in chosen:
        missing = why_not(tier)
        if missing is None:
            total += run_tier(ready, tier, options, required)
        elif tier in required:
            print(f"\nThe {tier} tier is required and cannot run: {missing}.")
            total += Count(failed=1)
        else:
            left_out.append(f"{tier} did not run: {missing}")
    if "browser" in chosen:
        counted, missing = run_node_tests()
        total += counted
        left_out += [missing] if missing else []
    print(f"\n{total}" + (f" ({'; '.join(left_out)})" if left_out else ""))
    return 1 if total.failed else 0


class Count:
    """How many tests passed, failed and were skipped."""

    def __init__(self, passed=0, failed=0, skipped=0):
        self.passed, self.failed, self.skipped = passed, failed, skipped

    def __add__(self, other):
        return Count(self.passed + other.passed, self.failed + other.failed, self.skipped + other.skipped)

    def __str__(self):
        return f"{self.passed} passed, {self.failed} failed, {self.skipped} skipped"


def why_not(tier: str) -> str | None:
    """What this machine lacks to run a tier; None where it can."""
    if tier == "browser" and not browser():
        return "no Chromium or Chrome was found, CONCEPT_NODES_CHROMIUM may name one"
    return None


def browser() -> str | None:
    named = os.environ.get("CONCEPT_NODES_CHROMIUM")
    if named:
        return named if Path(named).is_file() else None
    return next(filter(None, map(shutil.which, BROWSERS)), None)


def run_check(ready: Ready, *command) -> Count:
    print(f"\n== {' '.join(str(part) for part in command[:-1])}", flush=True)
    failed = ready.inside(*command, variables={"RUFF_CACHE_DIR": str(ready.home / "ruff")})
    return Count(failed=1) if failed else Count(passed=1)


def run_tier(ready: Ready, tier: str, options, required: set[str]) -> Count:
    """Run one folder of tests in processes of its own, so that the host of one tier cannot reach another: as many as there are cores, and
    then the tests that time something, one at a time with the machine to themselves.
    """
    print(f"\n== tests/{tier}", flush=True)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(cores, MOST_WORKERS) if options.device == "cpu" else 1
    if workers == 1:
        return run_pytest(ready, tier, options, required)
    # Each has its share of the cores: threads that wait for one another on a core are slower than one thread by far.
    together = ("-n", workers, "--dist", "worksteal", "-m", "not alone")
    return run_pytest(ready, tier, options, required, *together, threads=cores // workers) + run_pytest(
        ready, tier, options, required, "-m", "alone", may_be_none=True
    )


def run_pytest(ready: Ready, tier: str, options, required: set[str], *how, threads: int | None = None, may_be_none=False) -> Count:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        status = ready.inside(
            *("pytest", "-c", ROOT / "pyproject.toml", "--rootdir", ROOT, "-o", f"cache_dir={ready.home / 'pytest'}", *how),
            *("--device", options.device, "--junitxml", report, ROOT / "tests" / tier, *options.passed_on),
            variables={
                "CONCEPT_NODES_CHROMIUM": browser() or "",
                "CONCEPT_NODES_REQUIRE": " ".join(required),
                "HYPOTHESIS_STORAGE_DIRECTORY": str(ready.home / "hypothesis"),
            }
            | ({"OMP_NUM_THREADS": str(threads)} if threads else {}),
        )
        counted = read_report(report)
    if status and not counted.failed and not (status == NO_TESTS and (options.passed_on or may_be_none)):
        return counted + Count(failed=1)  # pytest stopped before or beside its tests: nothing collected, a broken conftest, a crash
    return counted


def read_report(path: Path) -> Count:
    """The counts of a JUnit report; zeros where pytest wrote none."""
    if not path.is_file():
        return Count()
    count = Count()
    for suite in ElementTree.parse(path).iter("testsuite"):
        total, failed, skipped = (int(suite.get(name, 0)) for name in ("tests", "failures", "skipped"))
        failed += int(suite.get("errors", 0))
        count += Count(total - failed - skipped, failed, skipped)
    return count


def run_node_tests() -> tuple[Count, str | None]:
    """The browser code's own tests under `node --test`, and a reason where they could not run."""
    files = sorted(str(path) for folder in ("web", "tests") for path in (ROOT / folder).rglob("*.test.mjs"))
    if not files:
        return Count(), None
    node = shutil.which("node")
    if not node:
        return Count(), "JavaScript tests did not run: no Node.js was found"
    print("\n== node --test", flush=True)
    done = subprocess.run([node, "--test", "--test-reporter=tap", *files], capture_output=True, text=True)
    found = {name: int(number) for name, number in re.findall(r"^# (pass|fail|skipped) (\d+)$", done.stdout, re.MULTILINE)}
    counted = Count(found.get("pass", 0), found.get("fail", 0), found.get("skipped", 0))
    if done.returncode:
        print(done.stdout + done.stderr)
        counted.failed = max(counted.failed, 1)
    return counted, None
