"""Checkpoints of low-bit weights: the lab's own file, and what other projects store.

from qlab.quantization import formats
formats.save_qtensors("net.safetensors", {"layer0": qt}, {"made_by": "flexround"})
qts = formats.load_qtensors("net.safetensors")
net = formats.read_gptq("some-model-gptq/")     # read_compressed_tensors, read_awq; write_... for the way back
y = ops.matmul(x, net.qtensors[name], perm=net.perms.get(name))

Everything read stays packed: codes go from the other layout to the planar one of the kernels, layer by
layer. Needs the extra `qlab[formats]` (safetensors).
"""

from qlab.quantization.formats.awq import read_awq, write_awq
from qlab.quantization.formats.checkpoint import Checkpoint
from qlab.quantization.formats.compressed import read_compressed_tensors, write_compressed_tensors
from qlab.quantization.formats.gptq import read_gptq, write_gptq
from qlab.quantization.formats.own import (
    as_arrays,
    from_arrays,
    load_metadata,
    load_qtensors,
    save_qtensors,
)

__all__ = [
    "Checkpoint",
    "as_arrays",
    "from_arrays",
    "load_metadata",
    "load_qtensors",
    "read_awq",
    "read_compressed_tensors",
    "read_gptq",
    "save_qtensors",
    "write_awq",
    "write_compressed_tensors",
    "write_gptq",
]
