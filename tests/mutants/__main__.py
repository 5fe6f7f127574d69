# SPDX-License-Identifier: Apache-2.0
"""Run mutants, list those that nothing noticed, and write the table of docs/testing.md."""

from __future__ import annotations

import argparse
import signal
import sys

from tests.mutants import driver, report


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=driver.__doc__)
    parser.add_argument("--only", nargs="*", choices=driver.PACKAGES, metavar="PACKAGE", help="instead of all packages")
    parser.add_argument("--sample", type=int, default=0, metavar="N", help="as many mutants of each package")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no further mutant after that")
    options = parser.parse_args()
    packages = options.only or driver.PACKAGES
    reasons = report.Reasons.load()
    everything = {package: driver.sample(package, 0) for package in driver.PACKAGES}
    if stale := reasons.stale({mutant.name for found in everything.values() for mutant in found}):
        sys.exit("mutants: these reasons in tests/mutants/survivors.toml have no mutant:\n  " + "\n  ".join(stale))
    # Either signal ends what was started and removes its folder.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        tried = driver.try_all(packages, options.sample, options.seconds)
    except driver.WorkerError as error:
        sys.exit(f"mutants: {error}")
    except KeyboardInterrupt:
        sys.exit("mutants: stopped; the next run goes on from here")
    rows = {}
    for package, found in tried.items():
        outcomes = {mutant.name: str(answer["outcome"]) for mutant, answer in found}
        rows[package] = report.row(package, len(everything[package]), outcomes, reasons)
        for mutant, answer in found:
            why = report.reason(reasons.equivalent, mutant.name) or report.reason(reasons.accepted, mutant.name)
            if answer["outcome"] == "survived" and not why:
                print(f"not noticed: {mutant.module}:{mutant.line}: {mutant.name.split(' ', 1)[1]}")
            elif answer["outcome"] == "noticed" and mutant.name in reasons.equivalent | reasons.accepted:
                print(f"noticed, so its reason can go: {mutant.name}")
        print(rows[package])
    page = report.PAGE.read_text(encoding="utf-8")
    report.PAGE.write_text(report.update(rows, driver.PACKAGES, page), encoding="utf-8")


if __name__ == "__main__":
    main()
