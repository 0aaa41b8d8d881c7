"""Compile Triton kernels for a GPU without having one: the interpreter accepts what the compiler refuses."""

import json
import os
import subprocess
import sys


_SCRIPT = """
import importlib, json, sys
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

module, name, types, variants = json.loads(sys.argv[1])
function = getattr(importlib.import_module(module), name)
names = function.arg_names
for constants in variants:
    signature = {n: "constexpr" if n in constants else types[n] for n in names}
    values = {(names.index(n),): value for n, value in constants.items()}
    source = ASTSource(function, signature, values, {})
    compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 16})
"""


def assert_compiles(module, name, types, variants):
    """Compile one kernel for sm_90 with each of the constants in `variants`."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", _SCRIPT, json.dumps([module, name, types, variants])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, env=environment)
    assert done.returncode == 0, done.stderr
