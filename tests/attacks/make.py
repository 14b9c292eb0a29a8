#!/usr/bin/env python3
"""Writes the files of tests/attacks/ that README.md lists. Each is a small file with one fault.

The script needs only Python, and writes the same files every time: python3 tests/attacks/make.py
"""

import hashlib
import json
import shutil
import struct
from pathlib import Path

HERE = Path(__file__).resolve().parent


def write(name, content):
    path = HERE / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


# --- safetensors -------------------------------------------------------------------------------------------------------------------


def with_header(header, data=b"", length=None):
    header = header if isinstance(header, bytes) else header.encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def tensor(dtype, shape, begin, end):
    return json.dumps({"dtype": dtype, "shape": shape, "data_offsets": [begin, end]})


def safetensors():
    a = tensor("F16", [2], 0, 4)
    files = {
        "header_longer_than_file": with_header('{"a":' + a + "}", b"\0" * 4, length=4096),
        "header_of_100_mb": with_header("{}", length=100_000_000),
        "header_of_2_to_64": with_header("{}", length=2**64 - 1),
        "header_is_not_json": with_header("{]"),
        "header_is_a_list": with_header("[]"),
        "header_nested_deeply": with_header('{"a":' + "[" * 1500 + "]" * 1500 + "}"),
        "header_of_nothing": with_header(""),
        "name_not_utf8": with_header(b'{"\xff\xfe":' + a.encode() + b"}", b"\0" * 4),
        "name_twice": with_header('{"a":' + a + ',"a":' + tensor("F16", [2], 4, 8) + "}", b"\0" * 8),
        "offsets_overlap": with_header('{"a":' + a + ',"b":' + tensor("F16", [2], 2, 6) + "}", b"\0" * 6),
        "offsets_backwards": with_header('{"a":' + tensor("F16", [2], 4, 0) + "}", b"\0" * 4),
        "offsets_beyond_the_end": with_header('{"a":' + tensor("F16", [2], 0, 400) + "}", b"\0" * 4),
        "offsets_negative": with_header('{"a":' + tensor("F16", [2], -4, 0) + "}", b"\0" * 4),
        "gap_between_tensors": with_header('{"a":' + a + ',"b":' + tensor("F16", [2], 8, 12) + "}", b"\0" * 12),
        "bytes_after_the_last": with_header('{"a":' + a + "}", b"\0" * 400),
        "shape_overflows": with_header('{"a":' + tensor("F16", [2**32, 2**32, 2], 0, 4) + "}", b"\0" * 4),
        "shape_huge_and_zero": with_header('{"a":' + tensor("F16", [2**62, 2, 0], 0, 0) + "}"),
        "shape_negative": with_header('{"a":' + tensor("F16", [-2], 0, 4) + "}", b"\0" * 4),
        "shape_of_another_size": with_header('{"a":' + tensor("F16", [3], 0, 4) + "}", b"\0" * 4),
        "dtype_unknown": with_header('{"a":' + tensor("F17", [2], 0, 4) + "}", b"\0" * 4),
        "empty": b"",
        "seven_bytes": b"\0" * 7,
    }
    for name, content in files.items():
        write(f"safetensors/{name}.safetensors", content)


# --- containers --------------------------------------------------------------------------------------------------------------------


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def half(*values):
    return struct.pack(f"<{len(values)}e", *values)


def a_container(change=None, seal_again=True, cut=0, header=None):
    """A container of one weight [4, 2] with a mask, a palette of 2 bits for each 2 rows, and one bias. `change` may put in a fault.

    The hashes are corrected after the change, so that other checks must find the fault.
    """
    # Row-major elements 0, 1, 2, 3 and 6 are kept.
    indices, palettes = [0, 1, 2, 3, 1], [1.0, 2.0, 3.0, 4.0, -1.0, -2.0, -3.0, -4.0]
    dense = [1.0, 2.0, 3.0, 4.0, 0.0, 0.0, -2.0, 0.0]
    packed = sum(index << 2 * i for i, index in enumerate(indices)).to_bytes(2, "little")
    box = {
        "metadata": {"format": "sdxl-squeeze", "version": "1", "recipe": "null", "sources": "[]", "unet_config": "{}"},
        "row": {
            "axis": 0, "bits": 2, "group_size": 2, "kept": 5, "masked": True, "sha256": sha256(half(*dense)), "shape": [4, 2],
        },
        "tensors": [
            ["a.weight.palettes", "F16", [2, 4], half(*palettes)],
            ["bias", "F16", [2], half(1.0, -1.0)],
            ["a.weight.mask", "U8", [1], bytes([0b0100_1111])],
            ["a.weight.indices", "U8", [2], packed],
        ],
    }
    if change:
        change(box)
    metadata, tensors = box["metadata"], box["tensors"]
    metadata.setdefault("weights", json.dumps({"a.weight": box["row"]}))
    data = b"".join(content for *_, content in tensors)
    if seal_again:
        table = "".join(f"{name}={dtype} {shape}\n" for name, dtype, shape, _ in tensors)
        metadata.setdefault("data_sha256", sha256(data))
        metadata.setdefault("tensors_sha256", sha256(table.encode()))
        lines = "".join(f"{key}={metadata[key]}\n" for key in sorted(metadata))
        metadata.setdefault("metadata_sha256", sha256(lines.encode()))
    entries, begin = {"__metadata__": metadata}, 0
    for name, dtype, shape, content in tensors:
        entries[name] = {"data_offsets": [begin, begin + len(content)], "dtype": dtype, "shape": shape}
        begin += len(content)
    file = with_header(json.dumps(entries), data)
    return file[: len(file) - cut]


def containers():
    def row(**entries):
        return lambda box: box["row"].update(entries)

    def metadata(**entries):
        return lambda box: box["metadata"].update(entries)

    def part(name, content, shape=None):
        def change(box):
            for tensor in box["tensors"]:
                if tensor[0] == name:
                    tensor[3] = content
                    tensor[2] = shape or tensor[2]

        return change

    def without(name):
        return lambda box: box.update(tensors=[tensor for tensor in box["tensors"] if tensor[0] != name])

    def vectors(version="2", **entries):
        return lambda box: (box["row"].update(entries), box["metadata"].update(version=version))

    def with_tensor(*tensor):
        return lambda box: box["tensors"].insert(0, list(tensor))

    wide = json.dumps({
        "_class_name": "UNet2DConditionModel", "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
        "block_out_channels": [32] * 16, "attention_head_dim": 1, "cross_attention_dim": 40, "layers_per_block": 256,
        "transformer_layers_per_block": 256, "projection_class_embeddings_input_dim": 80, "norm_num_groups": 4,
        "down_block_types": ["CrossAttnDownBlock2D"] * 16, "up_block_types": ["CrossAttnUpBlock2D"] * 16,
    })
    files = {
        "data_hash_wrong": metadata(data_sha256="0" * 64),
        "metadata_hash_wrong": metadata(metadata_sha256="0" * 64),
        "table_hash_wrong": metadata(tensors_sha256="0" * 64),
        "weight_hash_wrong": row(sha256="0" * 64),
        "version_2": metadata(version="2"),
        "version_3": metadata(version="3"),
        "vectors_in_version_1": vectors(version="1", vector_length=2),
        "vectors_of_0": vectors(vector_length=0),
        "vectors_of_17": vectors(vector_length=17),
        "vectors_of_2_to_63": vectors(vector_length=2**63),
        "vectors_of_half_the_kept": vectors(vector_length=2),
        "vectors_of_fewer_palettes": vectors(vector_length=2, kept=4),
        "vectors_that_do_not_divide": vectors(vector_length=3),
        "vectors_along_inputs": vectors(vector_length=2, axis=1),
        "vectors_with_scales": vectors(vector_length=2, scaled=True),
        "format_of_others": metadata(format="pt"),
        "bits_5": row(bits=5),
        "bits_255": row(bits=255),
        "bits_without_axis": lambda box: box["row"].pop("axis"),
        "axis_7": row(axis=7),
        "group_does_not_divide": row(group_size=3),
        "group_of_0": row(group_size=0),
        "group_of_2_to_63": row(group_size=2**63),
        "kept_more_than_all": row(kept=9),
        "kept_2_to_64": row(kept=2**64 - 1),
        "kept_negative": row(kept=-1),
        "mask_keeps_another_number": part("a.weight.mask", bytes([0b0100_1110])),
        "mask_missing": without("a.weight.mask"),
        "mask_of_2_bytes": part("a.weight.mask", b"\x4f\0", [2]),
        "indices_with_stray_bits": part("a.weight.indices", b"\xe4\xfd"),
        "palette_too_short": part("a.weight.palettes", half(1.0, 2.0, 3.0, 4.0), [1, 4]),
        "palette_nan": part("a.weight.palettes", half(1.0, 2.0, 3.0, 4.0, -1.0, float("nan"), -3.0, -4.0)),
        "palette_infinite": part("a.weight.palettes", half(1.0, 2.0, 3.0, 4.0, -1.0, float("inf"), -3.0, -4.0)),
        "scales_without_scales": row(scaled=True),
        "shape_huge_without_data": row(shape=[2**31, 2**31], kept=2**62),
        "shape_overflows": row(shape=[2**40, 2**40]),
        "shape_empty": row(shape=[]),
        "shape_negative": row(shape=[-4, -2]),
        "row_with_unknown_key": row(vector_dim=2),
        "row_is_a_list": metadata(weights="[]"),
        "weights_nested_deeply": metadata(weights='{"a.weight":' + "[" * 1500 + "]" * 1500 + "}"),
        "tensor_of_integers": with_tensor("odd", "I64", [1], b"\0" * 8),
        "tensor_shadows_weight": with_tensor("a.weight", "F16", [4, 2], half(*[0.0] * 8)),
        "tensor_nan": part("bias", half(float("nan"), 0.0)),
        "config_is_not_a_unet": metadata(unet_config='{"_class_name": "AutoencoderKL"}'),
        "config_of_millions_of_layers": metadata(unet_config=wide),
    }
    for name, change in files.items():
        write(f"container/{name}.safetensors", a_container(change))
    write("container/cut_off.safetensors", a_container(cut=1))
    write("good/container.safetensors", a_container())


# --- Core ML packages --------------------------------------------------------------------------------------------------------------


def varint(n):
    out = b""
    while n >= 0x80:
        out += bytes([n & 0x7F | 0x80])
        n >>= 7
    return out + bytes([n])


def number(tag, value):
    return varint(tag << 3) + varint(value)


def text(tag, content, length=None):
    content = content if isinstance(content, bytes) else content.encode()
    return varint(tag << 3 | 2) + varint(len(content) if length is None else length) + content


FLOAT16, STRING = 10, 2


def value_type(code, shape):
    dimensions = b"".join(text(3, text(1, number(1, n))) for n in shape)
    return text(1, number(1, code) + (number(2, len(shape)) if shape else b"") + dimensions)


def named(name, code, shape):
    return text(1, name) + text(2, value_type(code, shape))


def string(content):
    return text(2, value_type(STRING, [])) + text(3, text(1, text(4, text(1, content))))


def blob(offset, shape, file="@model_path/weights/weight.bin"):
    return text(2, value_type(FLOAT16, shape)) + text(5, text(1, file) + number(2, offset))


def pair(tag, key, value):
    return text(tag, text(1, key) + text(2, value))


def operation(kind, name, shape, inputs=(), value=None):
    out = text(1, kind)
    for parameter, source in inputs:
        out += pair(2, parameter, text(1, text(1, source)))
    out += text(3, named(name, FLOAT16, shape)) + pair(5, "name", string(name))
    return out + (pair(5, "val", value) if value else b"")


def feature(name, shape):
    return text(1, name) + text(3, text(5, text(1, b"".join(varint(n) for n in shape)) + number(2, 65552)))


def a_model(offset=64, shape=(1, 16), file="@model_path/weights/weight.bin", extra=b"", depth=0, version=9, source="w"):
    """A program that adds a weight of 16 numbers to its input."""
    shape = list(shape)
    operations = [
        operation("const", "w", shape, value=blob(offset, shape, file)),
        operation("add", "y", shape, [("x", "x"), ("y", source)]),
    ]
    block = text(2, "y") + b"".join(text(3, op) for op in operations) + extra
    for _ in range(depth):
        block = text(2, "y") + text(3, text(1, "while_loop") + text(4, block))
    function = text(1, named("x", FLOAT16, shape)) + text(2, "CoreML8") + pair(3, "CoreML8", block)
    program = number(1, 1) + pair(2, "main", function)
    description = text(1, feature("x", shape)) + text(10, feature("y", shape))
    return number(1, version) + text(2, description) + text(502, program)


def a_blob(count=1, version=2, sentinel=0xDEADBEEF, code=1, size=32, start=128, unused=0, data=None):
    header = struct.pack("<II", count, version) + b"\0" * 56
    record = struct.pack("<IIQQQ", sentinel, code, size, start, unused) + b"\0" * 32
    return header + record + (half(*range(16)) if data is None else data)


MODEL, WEIGHTS = "com.apple.CoreML/model.mlmodel", "com.apple.CoreML/weights"


def a_manifest(change=None):
    item = lambda name, path: {"author": "com.apple.CoreML", "description": name, "name": name, "path": path}
    manifest = {
        "fileFormatVersion": "1.0.0",
        "itemInfoEntries": {"A": item("model.mlmodel", MODEL), "B": item("weights", WEIGHTS)},
        "rootModelIdentifier": "A",
    }
    if change:
        change(manifest)
    return json.dumps(manifest)


def packages():
    def package(name, manifest=None, model=None, weights=None):
        """Writes only the files that differ from those of the good package. The test copies the others."""
        for file, content in [("Manifest.json", manifest), (f"Data/{MODEL}", model), (f"Data/{WEIGHTS}/weight.bin", weights)]:
            if content is not None:
                write(f"package/{name}.mlpackage/{file}", content)

    def item(which, **entries):
        return a_manifest(lambda manifest: manifest["itemInfoEntries"][which].update(entries))

    for file, content in [("Manifest.json", a_manifest()), (f"Data/{MODEL}", a_model()), (f"Data/{WEIGHTS}/weight.bin", a_blob())]:
        write(f"good/package.mlpackage/{file}", content)
    package("manifest_path_up", item("A", path="../../../../../etc/passwd"))
    package("manifest_path_absolute", item("B", path="/etc"))
    package("manifest_path_empty", item("B", path=""))
    package("manifest_without_weights", a_manifest(lambda manifest: manifest["itemInfoEntries"].pop("B")))
    package("manifest_without_root", a_manifest(lambda manifest: manifest.update(rootModelIdentifier="C")))
    package("manifest_item_absent", item("B", path="com.apple.CoreML/elsewhere"))
    package("manifest_version_2", a_manifest(lambda manifest: manifest.update(fileFormatVersion="2.0.0")))
    package("manifest_not_json", "{]")
    package("manifest_nested_deeply", "[" * 1500)
    package("model_empty", model=b"")
    package("model_length_of_2_to_60", model=number(1, 9) + text(2, b"", length=2**60))
    package("model_varint_without_end", model=b"\xff" * 64)
    package("model_nested_deeply", model=a_model(depth=60))
    package("model_of_groups", model=b"\x0b" * 2000)
    package("model_version_10", model=a_model(version=10))
    package("model_reads_what_is_not_there", model=a_model(source="v"))
    package("model_shape_overflows", model=a_model(shape=(2**33, 2**33)))
    package("model_shape_zero", model=a_model(shape=(1, 0)))
    package("model_other_blob_file", model=a_model(file="/etc/passwd"))
    package("blob_offset_beyond_the_end", model=a_model(offset=2**40))
    package("blob_offset_into_a_record", model=a_model(offset=65))
    package("blob_sentinel_wrong", weights=a_blob(sentinel=0xDEADBEEE))
    package("blob_count_wrong", weights=a_blob(count=2))
    package("blob_count_2_to_32", weights=a_blob(count=2**32 - 1))
    package("blob_version_1", weights=a_blob(version=1))
    package("blob_dtype_unknown", weights=a_blob(code=99))
    package("blob_size_beyond_the_end", weights=a_blob(size=2**63))
    package("blob_start_elsewhere", weights=a_blob(start=2**63))
    package("blob_unused_bits_200", weights=a_blob(unused=200))
    package("blob_nan", weights=a_blob(data=half(float("nan"), *range(15))))
    package("blob_cut_off", weights=a_blob()[:-1])
    package("blob_empty", weights=b"")
    package("blob_nobody_uses", weights=a_blob(count=2) + a_blob(start=256)[64:])


# --- run configs -------------------------------------------------------------------------------------------------------------------


def configs():
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 20))
    files = {
        "alias_bomb": bomb,
        "alias_of_itself": "prune: &a [*a]\n",
        "alias_unknown": "prune: *nothing\n",
        "nested_lists": "[" * 2000,
        "nested_mappings": "{a: " * 800,
        "nested_by_indent": "".join(" " * i + "a:\n" for i in range(80)),
        "key_twice": "palettize:\n  global_config:\n    n_bits: 4\n    n_bits: 6\n",
        "key_unknown": "palettise:\n  global_config:\n    n_bits: 4\n",
        "key_is_a_list": "? [a, b]\n: 1\n",
        "tabs": "palettize:\n\tglobal_config:\n\t\tn_bits: 4\n",
        "mark_in_the_middle": "palettize:\n  global_config:\n    n_bits: \ufeff4\n",
        "utf16": "palettize: null\n".encode("utf-16"),
        "nul": "palettize: \0\n",
        "not_utf8": b"palettize: \xff\xfe\n",
        "integer_of_100_digits": "palettize:\n  global_config:\n    n_bits: " + "9" * 100 + "\n",
        "integer_2_to_63": "palettize:\n  global_config:\n    n_bits: 4\ncalibration:\n  steps: 9223372036854775808\n",
        "integer_negative": "palettize:\n  global_config:\n    n_bits: -4\n",
        "number_nan": "prune:\n  global_config:\n    target_sparsity: .nan\n",
        "number_infinite": "prune:\n  global_config:\n    target_sparsity: .inf\n",
        "tag_python": "prune: !!python/object/apply:os.system [true]\n",
        "merge_key": "<<: {palettize: null}\n",
        "documents": "palettize: null\n---\npalettize: null\n",
        "directive": "%YAML 9.9\n---\npalettize: null\n%",
        "empty": "",
        "only_comments": "# nothing\n",
        "a_number": "42\n",
        "pattern_broken": "palettize:\n  module_name_configs:\n    'up_blocks(': {n_bits: 4}\n",
        "pattern_huge": "palettize:\n  module_name_configs:\n    '(a{1000}){1000}': {n_bits: 4}\n",
        "pattern_nested_deeply": "palettize:\n  module_name_configs:\n    '" + "(" * 1000 + "a" + ")" * 1000 + "': {n_bits: 4}\n",
        "text_without_end": 'palettize: "n_bits\n',
    }
    for name, content in files.items():
        write(f"config/{name}.yaml", content)


# --- calibration samples -----------------------------------------------------------------------------------------------------------


def samples():
    """Samples for a UNet with 4 latent channels, text states of 80, and an added embedding of 48 + 6 * 8 numbers."""

    def file(change=None):
        shapes = {
            "sample": [1, 1, 4, 2, 2], "timestep": [1], "encoder_hidden_states": [1, 1, 2, 80], "text_embeds": [1, 1, 48],
            "time_ids": [1, 1, 6],
        }
        values = {}
        for name, shape in shapes.items():
            count = 1
            for n in shape:
                count *= n
            values[name] = half(*[1.0] * count)
        if change:
            change(shapes, values)
        entries, data = {}, b""
        for name, shape in shapes.items():
            entries[name] = {"dtype": "F16", "shape": shape, "data_offsets": [len(data), len(data) + len(values[name])]}
            data += values[name]
        return with_header(json.dumps(entries), data)

    def number_of(name, value):
        def change(shapes, values):
            values[name] = half(value) + values[name][2:]

        return change

    def shape_of(name, shape, content):
        def change(shapes, values):
            shapes[name], values[name] = shape, content

        return change

    def renamed(shapes, values):
        shapes["noise"], values["noise"] = shapes.pop("sample"), values.pop("sample")

    def one_more(shapes, values):
        shapes["more"], values["more"] = [1], half(1.0)

    def none(shapes, values):
        for name, shape in shapes.items():
            shape[0], values[name] = 0, b""

    files = {
        "nan": number_of("sample", float("nan")),
        "infinite_text": number_of("encoder_hidden_states", float("-inf")),
        "nan_timestep": number_of("timestep", float("nan")),
        "none": none,
        "height_of_0": shape_of("sample", [1, 1, 4, 0, 2], b""),
        "channels_of_3": shape_of("sample", [1, 1, 3, 2, 2], half(*[1.0] * 12)),
        "four_dimensions": shape_of("sample", [1, 4, 2, 2], half(*[1.0] * 16)),
        "text_of_79": shape_of("encoder_hidden_states", [1, 1, 2, 79], half(*[1.0] * 158)),
        "two_timesteps_for_one_sample": shape_of("timestep", [2], half(1.0, 2.0)),
        "ids_of_5": shape_of("time_ids", [1, 1, 5], half(*[1.0] * 5)),
        "huge_and_zero": shape_of("sample", [2**62, 0, 4, 2, 2], b""),
        "sample_missing": renamed,
        "tensor_unknown": one_more,
    }
    for name, change in files.items():
        write(f"samples/{name}.safetensors", file(change))
    write("good/samples.safetensors", file())


# --- prompts -----------------------------------------------------------------------------------------------------------------------


def prompts():
    files = {
        "empty": b"",
        "only_comments": b"# a\n#b\n   # c\n",
        "only_blank_lines": b"\xef\xbb\xbf\n \t\n\r\n",
        "not_utf8": b"a cat\na d\xf6g\n",
        "utf16": "a cat\n".encode("utf-16"),
        "surrogates": b"a cat \xed\xa0\x80\n",
    }
    for name, content in files.items():
        write(f"prompts/{name}.txt", content)


# --- a model's own configs ---------------------------------------------------------------------------------------------------------


def model_configs():
    unet = json.loads((HERE.parent / "golden/base-like/unet/config.json").read_text())
    files = {
        "nested_deeply": '{"block_out_channels": ' + "[" * 1500,
        "not_utf8": b'{"act_fn": "\xff"}',
        "a_list": "[]",
        "key_twice_and_wrong": '{"norm_num_groups": 4, "norm_num_groups": "four"}',
        "widths_of_0": json.dumps({**unet, "block_out_channels": [0, 0, 0]}),
        "widths_of_2_to_62": json.dumps({**unet, "block_out_channels": [2**62] * 3}),
        "levels_of_100": json.dumps({**unet, "block_out_channels": [8] * 100}),
        "layers_2_to_63": json.dumps({**unet, "layers_per_block": 2**63}),
        "heads_of_0": json.dumps({**unet, "attention_head_dim": 0}),
        "groups_of_0": json.dumps({**unet, "norm_num_groups": 0}),
        "epsilon_of_1e400": json.dumps(unet).replace("1e-05", "1e400"),
        "depth_negative": json.dumps({**unet, "transformer_layers_per_block": -1}),
        "millions_of_layers": json.dumps({
            **unet, "block_out_channels": [8] * 16, "attention_head_dim": 1, "layers_per_block": 256,
            "transformer_layers_per_block": 256, "down_block_types": ["CrossAttnDownBlock2D"] * 16,
            "up_block_types": ["CrossAttnUpBlock2D"] * 16,
        }),
    }
    for name, content in files.items():
        write(f"unet_config/{name}.json", content)


if __name__ == "__main__":
    for folder in HERE.iterdir():
        if folder.is_dir():
            shutil.rmtree(folder)
    for make in [safetensors, containers, packages, configs, samples, prompts, model_configs]:
        make()
