"""The canary's command line; see `scripts/canary.sh`."""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import shutil
import tempfile
from pathlib import Path

from canary import pinned, record
from canary.environments import LOCKS, ROOT, SHOWN, Environment, resolve
from canary.smoke import STEPS
from canary.steps import FAILED, OK, SKIPPED, Steps, last_line

HOSTS = ("hf", "llava")


def newest_or_oldest(environment: Environment) -> None:
    """Install it with the package, and try what a user does."""
    steps = environment.steps
    lock = steps.run("resolve", lambda: resolve(environment))
    if lock is None:
        return
    steps.run("install", lambda: environment.install(lock))
    steps.run("install llava_patch", lambda: _add(environment, "--no-deps"))
    steps.run("import", lambda: _quiet(environment.run(environment.python, "-c", "import llava_patch.patching.patch")))
    for host in HOSTS:
        _smoke(environment, host)
    if (environment.folder / "smoke" / "patched-hf").is_dir():
        steps.run("lmms-eval", lambda: _lmms_eval(environment))
    else:
        steps.add("lmms-eval", SKIPPED, "no patched checkpoint was saved")
    steps.run("doctor", lambda: _doctor(environment))


def _add(environment: Environment, *words: str) -> None:
    environment.pip("install", "--quiet", *words, environment.wheel())


def _quiet(said: str) -> None:
    """What a command printed is no news."""


def _smoke(environment: Environment, host: str) -> None:
    words = [environment.python, "-m", "canary.smoke", host, environment.folder / "smoke"]
    steps, said, why = environment.steps, "", ""
    try:
        said = environment.run(*words, PYTHONPATH=str(ROOT / "scripts"))
    except Exception as error:  # it ends badly when a step fails, which it has said then
        why = last_line(str(error))
    log = said or (environment.folder / "log.txt").read_text(encoding="utf-8").rpartition("canary.smoke")[2]
    lines = [json.loads(line) for line in log.splitlines() if line.startswith('{"step":')]
    ended = {line["step"]: line["error"] for line in lines}
    for name in STEPS:
        if name in ended:
            steps.add(f"{host}: {name}", FAILED if ended[name] else OK, last_line(ended[name] or ""))
        elif why:
            steps.add(f"{host}: {name}", FAILED, why)  # the process died in it
        else:
            steps.add(f"{host}: {name}", SKIPPED)
        if ended.get(name, "died"):
            why = ""


def _lmms_eval(environment: Environment) -> None:
    out = environment.folder / "evaluated"
    words = ["--model", "llava_hf", "--tasks", "saturation", "--device", "cpu", "--batch_size", "1", "--limit", "2"]
    words += ["--model_args", f"pretrained={environment.folder / 'smoke' / 'patched-hf'},device_map=cpu"]
    environment.run(environment.python, "-m", "lmms_eval", *words, "--output_path", out)
    written = list(out.glob("*/*_results.json"))
    assert written, "lmms-eval ended well and left no results"
    results = json.loads(written[0].read_text(encoding="utf-8"))["results"]["saturation"]
    assert results["attention_mass_final,none"] > 0, f"lmms-eval left {results}"


def _doctor(environment: Environment) -> None:
    try:
        environment.run(environment.python, "-m", "llava_patch.cli.main", "doctor")
    except Exception:  # what is in the way is in its JSON
        log = environment.folder / "doctor.json"
        environment.run("bash", "-c", f"{environment.python} -m llava_patch.cli.main doctor --json >{log} || true")
        rows = json.loads(log.read_text(encoding="utf-8"))["rows"]
        problems = [f"{row['what']}: {row['found']}" for row in rows if row["state"] == "problem"]
        raise AssertionError("; ".join(problems)) from None


def llava_pinned(environment: Environment) -> None:
    """Install the package beside what LLaVA pins: nothing moves, and training stays what it is."""
    steps = environment.steps
    steps.run("install", lambda: environment.install(LOCKS / "llava_pinned.txt"))
    before, said = environment.versions(), environment.check()
    plain = steps.run("train.py without llava_patch", lambda: pinned.train(environment, "without"))
    steps.run("install llava_patch", lambda: _add(environment))

    def nothing_moved() -> str:
        after = environment.versions()
        moved = [f"{name} {was} -> {after.get(name)}" for name, was in before.items() if after.get(name) != was]
        assert not moved, f"moved: {', '.join(moved)}"
        return f"added: {', '.join(sorted(set(after) - set(before)))}"

    def check_says_the_same() -> None:
        now = environment.check()
        assert now == said, f"pip check says {sorted(set(now.splitlines()) ^ set(said.splitlines()))}"

    def training(**env: str) -> str:
        return pinned.same(pinned.train(environment, f"with{len(env)}", **env), plain)

    steps.run("no version moved", nothing_moved)
    steps.run("pip check says the same", check_says_the_same)
    steps.run("train.py with it, nothing configured", training)
    steps.run("train.py with it, LLAVA_PATCH_DISABLE=1", lambda: training(LLAVA_PATCH_DISABLE="1"))


KINDS = {"newest": newest_or_oldest, "oldest": newest_or_oldest, "llava-pinned": llava_pinned}


def main() -> None:
    """Try what was asked for; exit status 1 when a step failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("environments", nargs="*", metavar="ENVIRONMENT", help=f"of {', '.join(KINDS)}; default: all")
    parser.add_argument("--keep", action="store_true", help="leave the environments, and say where they are")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "measured", help="folder of the record")
    arguments = parser.parse_args()
    unknown = set(arguments.environments) - set(KINDS)
    if unknown:
        parser.error(f"no environment is called {', '.join(sorted(unknown))}: there are {', '.join(KINDS)}")
    failed = False
    for name in arguments.environments or KINDS:
        folder = Path(tempfile.mkdtemp(prefix=f"llava_patch-{name}-"))
        print(f"== {name} in {folder} ==", flush=True)
        steps = Steps(folder / "log.txt")
        environment = Environment(name, folder, steps)
        try:
            environment.make()
            KINDS[name](environment)
            versions = environment.versions()
        finally:
            if arguments.keep:
                print(f"{name}: kept in {folder}")
            else:
                shutil.rmtree(folder, ignore_errors=True)
        failed = failed or steps.failed()
        found = {
            "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
            "llava_patch": versions.get("llava-patch", ""),
            "python": platform.python_version(),
            "machine": f"{platform.system()} {platform.machine()}",
            "versions": {package: versions[package] for package in SHOWN if package in versions},
            "steps": steps.rows,
        }
        record.update(arguments.output, name, found)
    print(f"wrote {arguments.output / 'canary.json'} and {arguments.output / 'canary.md'}")
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
