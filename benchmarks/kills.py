"""Pair generation killed at random moments, nothing lost or doubled; and how much of its time is the network's.

One folder is made in peace, another under SIGKILLs at random moments; both manifests' checksums must agree. Then a
shard is made with a clock on every call of the U-Net.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from results import save

from distill import backbones
from distill.cli import quiet
from distill.data.generate import PairGeneration, TeacherPairs
from distill.files import read_json


def command(folder: Path, options: argparse.Namespace) -> list[str]:
    """Generates small shards, so that many kills fall into few minutes."""
    settings = {"teacher": "tiny-sd", "output": folder, "count": options.count, "steps": 4, "shard_size": 16}
    settings |= {"batch_size": 16, "accelerator": "cpu", "devices": 1}
    return [sys.executable, "-m", "distill", "generate", "pairs", *(f"--{k}={v}" for k, v in settings.items())]


def under_fire(folder: Path, options: argparse.Namespace) -> int:
    """Starts the command again and again until it ends by itself; returns the number of kills."""
    dice, kills = random.Random(options.seed), 0
    while True:
        process = subprocess.Popen(command(folder, options), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            limit = None if kills == options.kills else options.warm_up + dice.random() * options.spread
            if process.wait(limit) == 0:
                return kills
            raise RuntimeError(f"generation ended with {process.returncode}")
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1


def network_share(folder: Path, steps: int, count: int) -> float:
    """Share of a shard's time that passes inside the U-Net."""
    generation = PairGeneration(count=count, steps=steps, shard_size=count, batch_size=128)
    maker = TeacherPairs(backbones.load("tiny-sd"), folder, generation)
    inside, device = 0.0, torch.device("cpu")
    network: Any = maker.pipeline(device).unet
    forward = network.forward

    def timed(*args: Any, **kwargs: Any) -> Any:
        nonlocal inside
        start = time.perf_counter()
        answer = forward(*args, **kwargs)
        inside += time.perf_counter() - start
        return answer

    network.forward = timed
    start = time.perf_counter()
    maker.write(0, device)
    whole = time.perf_counter() - start
    shutil.rmtree(folder, ignore_errors=True)
    return inside / whole


def main() -> None:
    """Runs both parts, prints and writes the result."""
    quiet()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--count", type=int, default=2048, help="pairs of the folders")
    parser.add_argument("--warm-up", type=float, default=8.0, help="seconds before a kill may fall: the imports'")
    parser.add_argument("--spread", type=float, default=4.0, help="seconds within which it falls")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("runs/kills"), help="emptied at the start")
    options = parser.parse_args()
    shutil.rmtree(options.folder, ignore_errors=True)
    subprocess.run(command(options.folder / "peace", options), check=True, stdout=subprocess.DEVNULL)
    kills = under_fire(options.folder / "fire", options)
    shards = [read_json(options.folder / name / "manifest.json")["shards"] for name in ("peace", "fire")]
    left = [path.name for path in (options.folder / "fire").iterdir() if path.suffix != ".arrow"]
    values: dict[str, Any] = {
        "kills": kills,
        "pairs": options.count,
        "shards": len(shards[0]),
        "differing_shards": sum(shards[0][name] != shards[1].get(name) for name in shards[0]),
        "unknown_shards": len(set(shards[1]) - set(shards[0])),
        "left_over_files": [name for name in left if name != "manifest.json"],
        "network_share_of_time": round(network_share(options.folder / "timed", steps=50, count=256), 4),
    }
    print(values)
    print(save("pairs", values, [options.seed]))


if __name__ == "__main__":
    main()
