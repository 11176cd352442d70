"""``make bench``: every benchmark in one run; writes the tables of this machine into RESULTS.md beside this file."""

import datetime
import logging
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import actstore
from actstore.demo import TEXT_PATH
from tests.benchmarks import (
    bench_analysis,
    bench_cli,
    bench_dashboard,
    bench_forward,
    bench_geometry,
    bench_hooks,
    bench_hooks_memory,
    bench_loader,
    bench_loader_s3,
    bench_open,
    bench_patching,
    bench_probes,
    bench_prompts,
    bench_query,
    bench_recall,
    bench_s3,
    bench_sae_evaluation,
    bench_slow,
    bench_storage,
    bench_store,
)
from tests.benchmarks.measure import Result, tables
from tests.benchmarks.results import section, write, write_rows
from tests.pretrained import smollm2


def main(chosen: list[str]) -> int:
    """Run all benchmarks and write this machine's section of RESULTS.md, or the named ones and write their rows. A
    missed target is marked, and is no error; returns 2 if a name is unknown.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    logging.disable(logging.WARNING)
    results: list[Result] = []
    with tempfile.TemporaryDirectory(prefix="actstore-bench-", dir=Path.cwd()) as name:
        folder = Path(name)
        model = smollm2()
        benches: dict[str, Callable[[], list[Result]]] = {
            "storage": lambda: bench_storage.run(folder),
            "store": lambda: bench_store.run(folder),
            "s3": bench_s3.run,
            "open": bench_open.run,
            "slow": lambda: bench_slow.run(folder),
            "loader": lambda: [*bench_loader.run(folder), *bench_loader_s3.run(folder)],
            "query": lambda: bench_query.run(folder),
            "forward": lambda: bench_forward.run(model, folder),
            "prompts": lambda: bench_prompts.run(model, folder),
            "probes": lambda: bench_probes.run(folder),
            "geometry": lambda: bench_geometry.run(folder),
            "recall": lambda: bench_recall.run(model, folder),
            "hooks": lambda: [
                *bench_hooks.run(bench_hooks.on_cpu(model)),
                *bench_hooks_memory.run(bench_hooks_memory.on_cpu(model)),
            ],
            "analysis": lambda: bench_analysis.run(folder),
            "patching": lambda: bench_patching.run(model),
            "sae": lambda: bench_sae_evaluation.run(folder),
            "dashboard": lambda: bench_dashboard.run(model, folder),
            "cli": lambda: bench_cli.run(_any_store(folder, model)),
        }
        unknown = sorted(set(chosen) - set(benches))
        if unknown:
            print(f"there is no benchmark {unknown[0]!r}; there are {', '.join(benches)}", file=sys.stderr)
            return 2
        for bench in chosen or list(benches):
            print(f"{datetime.datetime.now():%H:%M:%S} {bench}", file=sys.stderr, flush=True)
            new = benches[bench]()
            print(tables(new), file=sys.stderr, flush=True)
            results += new
        text = section(results, folder)
    print(text)
    if not chosen or not write_rows(tables(results), chosen):
        write(text)
    return 0


def _any_store(folder: Path, model: Path) -> Path:
    store = folder / "small"
    planned = actstore.plan(
        model=str(model),
        tokens=str(TEXT_PATH),
        hooks="blocks.0.hook_resid_post",
        context_length=128,
        max_tokens=4096,
        out=str(store),
    )
    actstore.extract(planned)
    return store


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
