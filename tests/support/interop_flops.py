"""XLA's own count of a program's operations: interop_flops.py FILE... prints one number a line.

Each file is an HloModuleProto. Runs where JAX is, as TensorFlow does not show XLA's cost analysis.
"""

import sys

import jax
from jax._src.lib import _jax

client = jax.devices("cpu")[0].client
for path in sys.argv[1:]:
    with open(path, "rb") as file:
        module = _jax.mlir.hlo_to_stablehlo(file.read())
    computation = _jax.mlir.mlir_module_to_xla_computation(
        module, use_tuple_args=False, return_tuple=False
    )
    print(_jax.hlo_module_cost_analysis(client, computation.as_hlo_module())["flops"])
