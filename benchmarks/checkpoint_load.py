"""How long loading a checkpoint takes and how much memory, against transformers' from_pretrained, in one run.

A synthetic Llama of 1.1 B parameters (TinyLlama's shape) in bfloat16, in sharded safetensors, is loaded by ours and by
transformers in turns, each time in a new process on the CPU, from a warm page cache: into float32, what scoring on a
CPU takes, or as it is in the files. In the second case transformers copies nothing, its parameters are a memory map of
the files; to count them as loaded, each page of them is touched.

    python benchmarks/checkpoint_load.py [--rounds 5] [--dtype float32] [--folder DIR]

With --cold the files are dropped from the page cache before each load, and each round also reads them from the disk
without doing anything with the bytes; transformers is left out.
"""

import argparse
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

TINYLLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32_000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
COMMON = """
import json, sys, time
started = time.perf_counter()
folder, dtype = sys.argv[1:]
def status(key):
    return next(int(line.split()[1]) * 1024 / 1e9 for line in open("/proc/self/status") if line.startswith(key))
def report(weights):
    seconds = time.perf_counter() - begun
    result = {"load_s": seconds, "process_s": time.perf_counter() - started, "peak_gb": status("VmHWM"),
              "peak_of_load_gb": status("VmHWM") - before, "weights_gb": weights / 1e9}
    print(json.dumps(result))
"""
OURS = (
    COMMON
    + """
from fineline_jax.cpu_backend import prepare_cpu
prepare_cpu()
from pathlib import Path
import jax
from fineline_jax.checkpoints.formats.huggingface import load_hf
from fineline_jax.mesh import make_mesh
mesh = make_mesh()
before, begun = status("VmRSS"), time.perf_counter()
config, params = load_hf(Path(folder), mesh, dtype)
jax.block_until_ready(params)
report(sum(leaf.nbytes for leaf in jax.tree.leaves(params)))
"""
)
TRANSFORMERS = (
    COMMON
    + """
import torch
from transformers import LlamaForCausalLM
before, begun = status("VmRSS"), time.perf_counter()
model = LlamaForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
touched = [leaf.detach().view(-1)[:: 4096 // leaf.element_size()].sum() for leaf in model.parameters()]
report(sum(leaf.numel() * leaf.element_size() for leaf in model.parameters()))
"""
)


def write_checkpoint(folder: Path) -> None:
    """Random weights in sharded safetensors, layer by layer."""
    import jax

    from fineline_jax.checkpoints.formats.huggingface import export_hf
    from fineline_jax.checkpoints.formats.lazy_tensor import BFLOAT16
    from fineline_jax.mesh import make_mesh
    from fineline_jax.models.decoder import abstract_params
    from fineline_jax.models.families import of_hf
    from fineline_jax.models.families.hf_config import HfConfig

    random = np.random.default_rng(0)
    draw = lambda leaf: jax.device_put(
        (0.02 * random.standard_normal(leaf.shape, np.float32)).astype(BFLOAT16), leaf.sharding
    )
    _, config = of_hf(HfConfig("TinyLlama", TINYLLAMA))
    params = jax.tree.map(draw, abstract_params(config, make_mesh()))
    export_hf(config, params, folder, shard_bytes=500_000_000)


def forget(folder: Path) -> None:
    """Drop the weight files from the page cache."""
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_files(folder: Path) -> float:
    """Seconds to read the weight files, 8 MiB at a time, into the same memory."""
    block, started = bytearray(1 << 23), time.perf_counter()
    for file in folder.glob("*.safetensors"):
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(block):
                pass
    return time.perf_counter() - started


def load(code: str, folder: Path, dtype: str) -> dict[str, float]:
    command = [sys.executable, "-c", code, str(folder), dtype]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(output.splitlines()[-1])


def cold(folder: Path, dtype: str, rounds: int) -> None:
    """Print the rates at which the files are loaded and read, in GB/s, of each round."""
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e9
    found: dict[str, list[float]] = {"load_gb_per_s": [], "disk_gb_per_s": [], "cached_gb_per_s": []}
    for _ in range(rounds):
        forget(folder)
        found["load_gb_per_s"].append(round(size / load(OURS, folder, dtype)["load_s"], 2))
        forget(folder)
        found["disk_gb_per_s"].append(round(size / read_files(folder), 2))
        found["cached_gb_per_s"].append(round(size / load(OURS, folder, dtype)["load_s"], 2))
    print(json.dumps({"dtype": dtype, "gb": round(size, 2), **found}, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="float32", help="of the loaded weights")
    parser.add_argument("--cold", action="store_true", help="from the disk instead of from the page cache")
    parser.add_argument("--folder", type=Path, help="keep the checkpoint here, and take it from here if it is there")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary) / "checkpoint"
        if not folder.exists():
            subprocess.run([sys.executable, __file__, "--write", str(folder)], check=True)
        if arguments.cold:
            return cold(folder, arguments.dtype, arguments.rounds)
        read_files(folder)  # into the page cache
        found: dict[str, list[dict[str, float]]] = {"ours": [], "transformers": []}
        for _ in range(arguments.rounds):
            for name, code in (("ours", OURS), ("transformers", TRANSFORMERS)):
                found[name].append(load(code, folder, arguments.dtype))
    medians = {
        name: {key: round(statistics.median(run[key] for run in runs), 3) for key in runs[0]}
        for name, runs in found.items()
    }
    ratio = lambda key: round(medians["ours"][key] / medians["transformers"][key], 3)
    packages = ("jax", "numpy", "torch", "transformers", "safetensors")
    result = {
        "dtype": arguments.dtype,
        "rounds": arguments.rounds,
        **medians,
        "ours_to_transformers": {key: ratio(key) for key in ("load_s", "process_s", "peak_gb", "peak_of_load_gb")},
        "load_s_of_each_round": {name: [round(run["load_s"], 2) for run in runs] for name, runs in found.items()},
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--write"]:
        write_checkpoint(Path(sys.argv[2]))
    else:
        main()
