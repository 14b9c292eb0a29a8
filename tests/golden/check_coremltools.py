"""Converts what `export --to coremltools` wrote, and compares each weight that coremltools then has with the file.

    python check_coremltools.py FILE    # `cargo test buffers` leaves ../../target/tmp/coremltools.safetensors

Every weight that has a look-up table must be looked up in that very table, along its `vector_axis`, and be the weight in the file.
"""

import importlib.util
import pathlib
import re
import sys
import tempfile

import coremltools as ct
import numpy as np
from coremltools.converters.mil.frontend.milproto.load import load
from safetensors import safe_open

HERE = pathlib.Path(__file__).parent
SPEC = importlib.util.spec_from_file_location("convert", HERE.parent.parent / "docs/convert_with_coremltools.py")
CONVERT = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(CONVERT)


def main(source):
    with tempfile.TemporaryDirectory() as folder:
        package = str(pathlib.Path(folder) / "unet.mlpackage")
        CONVERT.main(source, package)
        model = ct.models.MLModel(package, skip_model_load=True)
        spec = model.get_spec()
        program = load(spec, specification_version=spec.specificationVersion, file_weights_dir=model.weights_dir)
        found = {re.sub("[^a-z0-9]", "_", op.outputs[0].name.lower()): op for op in program.functions["main"].operations if "constexpr" in op.op_type}
        seen = {"scalar": 0, "vectors": 0}
        with safe_open(source, "np") as file:
            for name in file.keys():
                if not name.endswith("._COREML_/weight/lut"):
                    continue
                module, lut = name.removesuffix("._COREML_/weight/lut"), file.get_tensor(name)
                length = lut.shape[-1]
                ends = re.sub("[^a-z0-9]", "_", f"{module}.weight".lower())
                # The weights are those of `Wrapped.unet`, in half precision.
                op = found[f"unet_{ends}_cast_fp16"]
                made = op.materialized_val_inference()
                wanted = file.get_tensor(f"{module}.weight")
                assert np.array_equal(np.asarray(made, np.float32).reshape(wanted.shape), wanted.astype(np.float32)), module
                if op.op_type == "constexpr_lut_to_dense":
                    assert np.array_equal(op.lut.val.reshape(lut.shape), lut), module
                    assert (0 if length == 1 else int(op.vector_axis.val)) == 0, module
                    assert op.indices.shape[0] * length == wanted.shape[0], module
                    seen["vectors" if length > 1 else "scalar"] += 1
        print(f"{source}: {seen['vectors']} weights of vectors and {seen['scalar']} of single values, looked up in the tables of the file")
        assert seen["vectors"]


if __name__ == "__main__":
    main(*sys.argv[1:])
