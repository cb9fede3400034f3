"""The number of a model's layers for the GPUs, from its headers, its footprint and the devices.

Pure: it queries no device, and starts nothing on them.
"""

import re
from collections import defaultdict
from collections.abc import Sequence

from orion_oie.backends.base import Footprint
from orion_oie.backends.llama.host.offload import (
    GpuPlan,
    choose_gpu_layers,
)
from orion_oie.hardware.machine import LlamaDevices
from orion_oie.models.formats.gguf import GGUFHeader

_LAYER = re.compile(r"blk\.(\d+)\.")
_KEPT_SHARE = 0.05
_KEPT_AT_LEAST_BYTES = 256 * 2**20


def layers_for(
    headers: Sequence[GGUFHeader], footprint: Footprint, devices: LlamaDevices
) -> GpuPlan:
    """The layers of a model that fit into the free memory of the GPUs; none, with the reason, if
    there is no GPU or its free memory is unknown. A twentieth of each GPU is left free."""
    gpus = [device for device in devices.devices if device.kind != "cpu"]
    if not gpus:
        return GpuPlan(0, 0, devices.problem or "llama.cpp sees no GPU")
    unknown = [device.name for device in gpus if device.free_bytes is None]
    if unknown:
        return GpuPlan(0, 0, f"{', '.join(unknown)} does not say how much memory is free")
    layers: dict[int, int] = defaultdict(int)
    others: dict[str, int] = {}
    for header in headers:
        for tensor in header.tensors:
            found = _LAYER.match(tensor.name)
            if found is not None:
                layers[int(found[1])] += tensor.n_bytes
            else:
                others[tensor.name] = tensor.n_bytes
    # A model without an output matrix uses its embeddings, and llama.cpp copies them.
    output = others.get("output.weight", others.get("token_embd.weight", 0))
    kept = sum(max(int(_KEPT_SHARE * (gpu.total_bytes or 0)), _KEPT_AT_LEAST_BYTES) for gpu in gpus)
    return choose_gpu_layers(
        [layers[number] for number in sorted(layers)],
        output_bytes=output,
        kv_bytes_per_layer=footprint.kv_bytes // max(1, len(layers)),
        compute_bytes=footprint.compute_bytes * len(gpus),
        free_bytes=sum(gpu.free_bytes or 0 for gpu in gpus),
        reserve_bytes=kept,
    )
