"""``make bench``: every benchmark in one run; prints one table and writes RESULTS.md beside this file."""

import datetime
import logging
import os
import platform
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from actstore.demo import TEXT_PATH
from tests.benchmarks import (
    bench_cli,
    bench_forward,
    bench_hooks,
    bench_hooks_memory,
    bench_loader,
    bench_loader_s3,
    bench_open,
    bench_query,
    bench_ray,
    bench_s3,
    bench_slow,
    bench_storage,
    bench_store,
)
from tests.benchmarks.measure import Ratio, table
from tests.pretrained import smollm2

NOTES = Path(__file__).parent / "NOTES.md"
RESULTS = Path(__file__).parent / "RESULTS.md"
_PACKAGES = ("actstore", "torch", "transformers", "ray", "zarr", "transformer-lens", "sae-lens", "numpy")


def main(chosen: list[str]) -> int:
    """Run all benchmarks and write RESULTS.md, or print those that are named. A target that is missed is marked, and is
    no error; 2 if there is no benchmark of a name.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    logging.disable(logging.WARNING)
    ratios: list[Ratio] = []
    with tempfile.TemporaryDirectory(prefix="actstore-bench-", dir=Path.cwd()) as name:
        folder = Path(name)
        model = smollm2()
        benches: dict[str, Callable[[], list[Ratio]]] = {
            "storage": lambda: bench_storage.run(folder),
            "store": lambda: bench_store.run(folder),
            "s3": bench_s3.run,
            "open": bench_open.run,
            "slow": lambda: bench_slow.run(folder),
            "loader": lambda: [*bench_loader.run(folder), *bench_loader_s3.run(folder)],
            "query": lambda: bench_query.run(folder),
            "forward": lambda: bench_forward.run(model, TEXT_PATH, folder),
            "hooks": lambda: [
                *bench_hooks.run(bench_hooks.on_cpu(model)),
                *bench_hooks_memory.run(bench_hooks_memory.on_cpu(model)),
            ],
            "ray": lambda: bench_ray.run(model, TEXT_PATH, folder),
            "cli": lambda: bench_cli.run(_any_store(folder, model)),
        }
        unknown = sorted(set(chosen) - set(benches))
        if unknown:
            print(f"there is no benchmark {unknown[0]!r}; there are {', '.join(benches)}", file=sys.stderr)
            return 2
        for bench in chosen or list(benches):
            ratios += benches[bench]()
    text = _text(ratios)
    print(text)
    if not chosen:
        RESULTS.write_text(text, encoding="utf-8")
    return 0


def _any_store(folder: Path, model: Path) -> Path:
    reference = folder / "forward-reference"
    if not reference.exists():
        import actstore

        actstore.extract(
            actstore.plan(
                model=str(model),
                tokens=str(TEXT_PATH),
                hooks="blocks.0.hook_resid_post",
                context_length=128,
                max_tokens=4096,
                out=str(reference),
            )
        )
    return reference


def _text(ratios: list[Ratio]) -> str:
    versions = ", ".join(f"{package} {version(package)}" for package in _PACKAGES)
    head = (
        f"# Benchmarks\n\n{datetime.date.today()}, {os.cpu_count()} cores ({platform.machine()}), no GPU, "
        f"Python {platform.python_version()}.\n{versions}.\n\n"
        "Medians of runs in turns in one process; absolute figures drift with the machine, ratios are what counts.\n"
        "Memory is the growth of the resident peak over that of the bare forward, each in a process of its own.\n\n"
    )
    return f"{head}{table(ratios)}\n{NOTES.read_text(encoding='utf-8')}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
