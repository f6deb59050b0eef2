"""Options of XLA's compilers in named groups, each with what it was seen to do (`fineline plan --flags NAME`).

None is on by default. On the devices themselves they are set by LIBTPU_INIT_ARGS (TPU) or XLA_FLAGS (GPU).
"""

from collections.abc import Mapping

from fineline_jax.errors import UserError
from fineline_jax.plan.topologies import Topology

TPU = {
    "async_collectives": {
        "xla_tpu_enable_async_collective_fusion": "true",
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
        "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
        "xla_tpu_overlap_compute_collective_tc": "true",
        "xla_enable_async_all_gather": "true",
    },
}
GPU = {
    "latency_hiding": {
        "xla_gpu_enable_latency_hiding_scheduler": True,
        "xla_gpu_all_gather_combine_threshold_bytes": 512 << 20,
        "xla_gpu_reduce_scatter_combine_threshold_bytes": 512 << 20,
        "xla_gpu_all_reduce_combine_threshold_bytes": 512 << 20,
    },
}


def flags_of(names: str, topology: Topology) -> Mapping[str, str | bool | int]:
    """The options of the groups named, with commas between. Raises UserError listing what there is."""
    groups = GPU if topology.is_gpu else TPU
    chosen: dict[str, str | bool | int] = {}
    for name in filter(None, names.split(",")):
        if name not in groups:
            raise UserError(f"--flags {name}: no such group for {topology.name}; there is {', '.join(groups)}")
        chosen |= groups[name]
    return chosen
