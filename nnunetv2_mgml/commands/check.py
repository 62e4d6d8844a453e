"""``mgml check``: what a raw data set has and lacks, before anything is trained on it."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from nnunetv2_mgml.commands.arguments import add_processes
from nnunetv2_mgml.workflows.check import CheckRequest, DatasetCheck, check_dataset


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``mgml check``."""
    parser.add_argument("dataset", metavar="DATASET", help="dataset id or name; its raw data are read")
    parser.add_argument("-o", type=Path, metavar="OUT", help="folder for check.json and check.png, one page of figures")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    add_processes(parser)


def run(args: argparse.Namespace) -> int:
    """Run ``mgml check``; return 0, whatever was found."""
    check = check_dataset(CheckRequest(dataset=args.dataset, output=args.o, num_processes=args.num_processes))
    print(json.dumps(check.as_dict(), indent=2) if args.json else "\n".join(describe(check)))
    if args.o is not None and not args.json:
        print(f"\nwritten to {args.o}")
    return 0


def describe(check: DatasetCheck, most: int = 20) -> list[str]:
    """Return the report as text, one string a line.

    Args:
        check: what was found.
        most: how many findings are written out.
    """
    total = len(check.subsets)
    incomplete = sum(not all(subset) for subset in check.subsets.values())
    width = max(len(part) for part in check.splits)
    columns = {name: max(len(name), 8) for name in check.channels}
    lines = [
        f"{check.dataset}: {total} training cases, {incomplete} of them incomplete",
        "",
        f"{'':<{width}}  cases  " + "  ".join(f"{name:>{n}}" for name, n in columns.items()),
    ]
    for part, names in check.splits.items():
        counts = check.count(part)
        row = "  ".join(f"{counts[name]:{n}}" for name, n in columns.items())
        lines.append(f"{part:<{width}}  {len(names):5}  {row}")
    lines += ["", "Combinations in the training cases:"]
    lines += [f"  {count:5}  {name}" for name, count in check.combinations().items()]
    if incomplete:
        tests = "label, volume and site" if check.sites else "label and volume"
        lines += ["", f"What is missing goes with ({tests} looked at; p adjusted after Holm):"]
        lines += [f"  {a.text} (p {_p(a.p)})" for a in check.associations] or ["  nothing that these cases show"]
    findings = [f"  {case}: {text}" for case, texts in check.findings.items() for text in texts]
    lines += ["", f"Findings ({len(findings)}):" if findings else "Findings: none", *findings[:most]]
    if len(findings) > most:
        lines.append(f"  and {len(findings) - most} more (-o writes all of them to check.json)")
    if check.proposals:
        planning = f"nnUNetv2_plan_and_preprocess -d {check.dataset_id}"
        lines += ["", "Proposals:" if check.planned else f"Proposals (mgml plan: once {planning} is done):"]
        for proposal in check.proposals:
            lines += [f"  {proposal.why}:", f"    {proposal.command}"] if proposal.command else [f"  {proposal.why}"]
    return lines


def _p(value: float) -> str:
    return f"= {value:.2g}" if value >= 0.001 or math.isnan(value) else "< 0.001"
