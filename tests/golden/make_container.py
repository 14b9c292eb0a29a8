"""Writes and reads containers by docs/container.md, with numpy and the standard library.

    python make_container.py make container                 # write the golden files into the folder `container`
    python make_container.py packing container/packing.json # packed bits from coremltools 9.0 (needs coremltools)
    python make_container.py compare FILE DECODED           # decode FILE, compare with a plain safetensors file, check all hashes

`cargo test container` writes a container and its decoded weights to target/tmp, for `compare`.
"""

import hashlib
import json
import math
import pathlib
import struct
import sys

import numpy as np

WIDTHS = (1, 2, 3, 4, 6, 8)
DTYPES = {"F16": "<f2", "U8": "u1"}
# The keys of a weight that only version 2 has.
NEW = {"vector_length", "scale_block"}


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def compact(value):
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def pack(values, bits):
    """Packs numbers bit by bit, exactly as the definition says."""
    out = bytearray(math.ceil(len(values) * bits / 8))
    for i, value in enumerate(values):
        assert 0 <= value < 2**bits
        for b in range(bits):
            k = i * bits + b
            out[k // 8] |= ((int(value) >> b) & 1) << (k % 8)
    return bytes(out)


def unpack(data, bits, count):
    stream = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")
    assert len(data) == math.ceil(count * bits / 8) and not stream[count * bits :].any(), "padding"
    return (stream[: count * bits].reshape(count, bits).astype(np.int64) << np.arange(bits)).sum(axis=1)


# Safetensors


def read_safetensors(path):
    blob = pathlib.Path(path).read_bytes()
    (length,) = struct.unpack("<Q", blob[:8])
    header = json.loads(blob[8 : 8 + length])
    metadata = header.pop("__metadata__", {})
    return metadata, header, blob[8 + length :]


def write_safetensors(path, metadata, tensors):
    """Writes a safetensors file of `tensors`: (name, dtype, shape, bytes), in the order of their data."""
    header, data = {}, b""
    if metadata:
        header["__metadata__"] = metadata
    for name, dtype, shape, content in tensors:
        header[name] = {"data_offsets": [len(data), len(data) + len(content)], "dtype": dtype, "shape": list(shape)}
        data += content
    text = compact(header).encode()
    text += b" " * (-len(text) % 8)
    pathlib.Path(path).write_bytes(struct.pack("<Q", len(text)) + text + data)


def lines_hash(pairs):
    return sha256("".join(f"{key}={value}\n" for key, value in pairs).encode())


def table_hash(table):
    order = sorted(table, key=lambda name: (table[name]["data_offsets"], name))
    return lines_hash((name, f"{table[name]['dtype']} {table[name]['shape']}") for name in order)


# Reading


def read_container(path):
    """Returns decoded weights and uncompressed tensors by name, as fp16 arrays, and checks every hash."""
    metadata, table, data = read_safetensors(path)
    assert metadata["format"] == "sdxl-squeeze" and metadata["version"] in ("1", "2")
    assert metadata["metadata_sha256"] == lines_hash((k, metadata[k]) for k in sorted(metadata) if k != "metadata_sha256")
    assert metadata["data_sha256"] == sha256(data)
    assert metadata["tensors_sha256"] == table_hash(table)

    def content(name):
        entry = table.pop(name)
        start, end = entry["data_offsets"]
        return np.frombuffer(data[start:end], DTYPES[entry["dtype"]]).reshape(entry["shape"])

    out = {}
    for name, row in json.loads(metadata["weights"]).items():
        shape = row["shape"]
        numel = math.prod(shape)
        # Output channels that share an index and a bit of the mask.
        length = row.get("vector_length", 1)
        assert metadata["version"] == "2" or not NEW & row.keys()
        places = [shape[0] // length, *shape[1:]]
        keep = np.ones(numel // length, bool)
        if row["masked"]:
            keep = unpack(content(f"{name}.mask").tobytes(), 1, numel // length).astype(bool)
        assert keep.sum() * length == row["kept"]
        if "bits" in row:
            groups = shape[row["axis"]] // row["group_size"]
            indices = unpack(content(f"{name}.indices").tobytes(), row["bits"], row["kept"] // length)
            palettes = content(f"{name}.palettes")
            assert palettes.shape == (groups, 2 ** row["bits"], length)[: 3 if length > 1 else 2]
            position = np.unravel_index(np.nonzero(keep)[0], places)
            if length > 1:
                assert length <= 16 and row["axis"] == 0 and row["group_size"] % length == 0 and not row.get("scaled", False)
                values = palettes[position[0] * length // row["group_size"], indices]
            else:
                values = palettes[position[row["axis"]] // row["group_size"], indices]
            if row.get("scaled", False):
                scales = content(f"{name}.scales")
                if "scale_block" in row:
                    columns, block = math.prod(shape[1:]), row["scale_block"]
                    assert 1 <= block < columns and scales.shape == (shape[0], math.ceil(columns / block))
                    scales = scales[position[0], np.nonzero(keep)[0] % columns // block]
                else:
                    scales = scales[position[0]]
                values = (values.astype(np.float32) * scales.astype(np.float32)).astype(np.float16)
            else:
                assert "scale_block" not in row
        else:
            values = content(f"{name}.values")
        dense = np.zeros((numel // length, length), np.float16)
        dense[keep] = values.reshape(-1, length)
        # [o / length, i, ..., length] becomes [o / length, length, i, ...].
        dense = np.ascontiguousarray(np.moveaxis(dense.reshape(*places, length), -1, 1)).reshape(-1)
        assert sha256(dense.astype("<f2").tobytes()) == row["sha256"], name
        out[name] = dense.reshape(shape)
    for name in list(table):
        assert table[name]["dtype"] == "F16"
        out[name] = content(name)
    return out


# Writing


class Writer:
    def __init__(self, config, recipe, sources):
        self.info = {"unet_config": config, "recipe": recipe, "sources": sources}
        self.halves, self.bytes, self.weights, self.dense = [], [], {}, []

    def half(self, name, values):
        self.halves.append((name, "F16", values.shape, values.astype("<f2").tobytes()))

    def byte(self, name, content):
        self.bytes.append((name, "U8", [len(content)], content))

    def tensor(self, name, values):
        self.half(name, values)
        self.dense.append((name, "F16", values.shape, values.astype("<f2").tobytes()))

    def weight(self, name, shape, keep=None, values=None, bits=None, axis=0, group_size=1, palettes=None, indices=None, scales=None, block=None, report=None, length=1):
        """Adds a weight with `values`, or with `palettes` and `indices`, which have an entry for each element.

        With vectors of `length` output channels, indices and `keep` have an entry for each vector.
        With `block`, `scales` are [o, blocks], one for each block of so many columns.
        """
        numel = math.prod(shape)
        kept = np.ones(numel // length, bool) if keep is None else keep
        row = {"kept": int(kept.sum()) * length, "masked": keep is not None, "shape": list(shape)}
        if report is not None:
            row["report"] = report
        if keep is not None:
            self.byte(f"{name}.mask", pack(keep, 1))
        dense = np.zeros(numel, np.float16)
        if palettes is None:
            self.half(f"{name}.values", values[kept])
            dense[kept] = values[kept]
        else:
            row |= {"bits": bits, "axis": axis, "group_size": group_size}
            row |= {"vector_length": length} if length > 1 else {}
            self.byte(f"{name}.indices", pack(indices[kept], bits))
            self.half(f"{name}.palettes", palettes)
            inner = math.prod(shape[2:])
            # The first element of each vector: its row is a multiple of `length`.
            for k in np.nonzero(kept)[0] if length > 1 else []:
                r, rest = k // (shape[1] * inner) * length, k % (shape[1] * inner)
                for member in range(length):
                    dense[(r + member) * shape[1] * inner + rest] = palettes[r // group_size, indices[k], member]
            for e in np.nonzero(kept)[0] if length == 1 else []:
                r, c = e // (shape[1] * inner), e // inner % shape[1]
                entry = palettes[(r if axis == 0 else c) // group_size, indices[e]]
                # The product is exact in double precision, and is rounded once.
                at = r if block is None else (r, e % (shape[1] * inner) // block)
                dense[e] = np.float16(np.float64(entry) * np.float64(1 if scales is None else scales[at]))
            if scales is not None:
                row["scaled"] = True
                row |= {} if block is None else {"scale_block": block}
                self.half(f"{name}.scales", scales)
        content = dense.astype("<f2").tobytes()
        row["sha256"] = sha256(content)
        self.weights[name] = row
        self.dense.append((name, "F16", shape, content))

    def finish(self, path, decoded):
        tensors = self.halves + self.bytes
        data = b"".join(content for *_, content in tensors)
        metadata = {"format": "sdxl-squeeze", "version": "2" if any(NEW & row.keys() for row in self.weights.values()) else "1", "weights": compact(self.weights), "data_sha256": sha256(data)}
        metadata |= {key: compact(value) for key, value in self.info.items()}
        table, end = {}, 0
        for name, dtype, shape, content in tensors:
            table[name] = {"data_offsets": [end, end + len(content)], "dtype": dtype, "shape": list(shape)}
            end += len(content)
        metadata["tensors_sha256"] = table_hash(table)
        metadata["metadata_sha256"] = lines_hash(sorted(metadata.items()))
        write_safetensors(path, metadata, tensors)
        write_safetensors(decoded, {}, self.dense)


def make(folder):
    folder = pathlib.Path(folder)
    folder.mkdir(exist_ok=True)
    random = np.random.default_rng(3)
    halves = lambda *shape: random.normal(size=shape).astype(np.float16)
    sources = [{"file": "unet/diffusion_pytorch_model.safetensors", "bytes": 12345, "sha256": sha256(b"source")}]
    writer = Writer({"_class_name": "UNet2DConditionModel", "sample_size": 16}, {"palettize": {"n_bits": 4}, "note": "Größe"}, sources)

    def palettized(name, shape, bits, axis, group_size, sparsity=None, scaled=False, report=None):
        numel = math.prod(shape)
        keep = None if sparsity is None else random.random(numel) >= sparsity
        writer.weight(
            name,
            shape,
            keep,
            bits=bits,
            axis=axis,
            group_size=group_size,
            palettes=halves(shape[axis] // group_size, 2**bits),
            indices=random.integers(0, 2**bits, numel),
            scales=halves(shape[0]) if scaled else None,
            report=report,
        )

    writer.tensor("conv_in.bias", halves(6))
    for bits in WIDTHS:
        palettized(f"linear_{bits}.weight", [6, 11], bits, 0, 2)
        palettized(f"pruned_{bits}.weight", [6, 11], bits, 0, 3, sparsity=0.4, report={"error": 0.25, "warnings": []})
    palettized("conv.weight", [8, 5, 3, 3], 4, 0, 4, sparsity=0.5)
    palettized("conv_inputs.weight", [3, 6, 3, 3], 3, 1, 2, sparsity=0.5)
    palettized("linear_inputs.weight", [5, 9], 2, 1, 3)
    palettized("tensor_wide.weight", [7, 9], 6, 0, 7, sparsity=0.3)
    palettized("scaled.weight", [4, 10], 4, 0, 2, scaled=True)
    palettized("scaled_inputs.weight", [4, 10, 1, 1], 3, 1, 5, sparsity=0.4, scaled=True)
    values = halves(60)
    keep = random.random(60) >= 0.4
    writer.weight("sparse.weight", [4, 5, 1, 3], keep, values=values)
    # One mask keeps no element, and one keeps all elements.
    palettized("empty.weight", [2, 4], 4, 0, 2, sparsity=1.0)
    palettized("full.weight", [2, 4], 4, 0, 2, sparsity=0.0)
    # Kept values may be +0 or -0.
    writer.weight("zeros.weight", [1, 3], np.array([True, True, False]), values=np.array([0.0, -0.0, 1.0], np.float16))
    writer.tensor("norm.weight", halves(2, 3))
    writer.finish(folder / "unet.squeezed.safetensors", folder / "decoded.safetensors")
    compare(folder / "unet.squeezed.safetensors", folder / "decoded.safetensors")
    make_vectors(folder, sources)
    make_blocks(folder, sources)


def make_vectors(folder, sources):
    """A container of version 2: vector palettes, and beside them a weight that version 1 could hold."""
    random = np.random.default_rng(7)
    halves = lambda *shape: random.normal(size=shape).astype(np.float16)
    writer = Writer({"_class_name": "UNet2DConditionModel", "sample_size": 16}, {"palettize": {"cluster_dim": 2}}, sources)

    def vectors(name, shape, bits, length, group_size, sparsity=None):
        count = math.prod(shape) // length
        keep = None if sparsity is None else random.random(count) >= sparsity
        palettes = halves(shape[0] // group_size, 2**bits, *([length] if length > 1 else []))
        indices = random.integers(0, 2**bits, count)
        writer.weight(name, shape, keep, bits=bits, group_size=group_size, palettes=palettes, indices=indices, length=length)

    writer.tensor("conv_in.bias", halves(6))
    for bits in WIDTHS:
        vectors(f"linear_{bits}.weight", [8, 11], bits, 2, 4)
        vectors(f"pruned_{bits}.weight", [12, 11], bits, 2 + bits % 3, 12, sparsity=0.4)
    vectors("conv.weight", [8, 5, 3, 3], 4, 4, 4, sparsity=0.5)
    vectors("long.weight", [32, 7], 3, 16, 16)
    vectors("scalar.weight", [8, 5], 4, 1, 2, sparsity=0.3)
    vectors("empty.weight", [4, 4], 4, 2, 2, sparsity=1.0)
    vectors("full.weight", [4, 4], 4, 4, 4, sparsity=0.0)
    writer.finish(folder / "vectors.squeezed.safetensors", folder / "vectors-decoded.safetensors")
    compare(folder / "vectors.squeezed.safetensors", folder / "vectors-decoded.safetensors")


def make_blocks(folder, sources):
    """A container of version 2 with scales for blocks of columns, and beside them a weight with one for each row."""
    random = np.random.default_rng(9)
    halves = lambda *shape: random.normal(size=shape).astype(np.float16)
    writer = Writer({"_class_name": "UNet2DConditionModel", "sample_size": 16}, {"palettize": {"values": "int"}}, sources)

    def blocks(name, shape, bits, block, axis=0, group_size=None, sparsity=None):
        numel, columns = math.prod(shape), math.prod(shape[1:])
        group_size = group_size or shape[axis]
        keep = None if sparsity is None else random.random(numel) >= sparsity
        palettes, indices = halves(shape[axis] // group_size, 2**bits), random.integers(0, 2**bits, numel)
        scales = halves(shape[0], math.ceil(columns / block)) if block else halves(shape[0])
        writer.weight(name, shape, keep, bits=bits, axis=axis, group_size=group_size, palettes=palettes, indices=indices, scales=scales, block=block)

    writer.tensor("conv_in.bias", halves(6))
    for bits in WIDTHS:
        blocks(f"linear_{bits}.weight", [4, 24], bits, 8)
        blocks(f"pruned_{bits}.weight", [3, 11], bits, 4, sparsity=0.4)
    blocks("conv.weight", [4, 3, 3, 3], 4, 10, group_size=2)
    blocks("conv_inputs.weight", [3, 4, 3, 3], 3, 7, axis=1, group_size=2, sparsity=0.5)
    blocks("ones.weight", [2, 5], 4, 1)
    blocks("rows.weight", [3, 5], 4, None)
    writer.finish(folder / "blocks.squeezed.safetensors", folder / "blocks-decoded.safetensors")
    compare(folder / "blocks.squeezed.safetensors", folder / "blocks-decoded.safetensors")


def packing(path):
    from coremltools.optimize._utils import pack_elements_into_bits

    random = np.random.default_rng(4)
    cases = []
    for bits in WIDTHS:
        for count in (1, 2, 3, 5, 8, 13, 64, 101):
            values = random.integers(0, 2**bits, count).astype(np.uint8)
            packed = pack_elements_into_bits(values, bits).tobytes()
            assert packed == pack(values, bits)
            assert (unpack(packed, bits, count) == values).all()
            cases.append({"bits": bits, "values": values.tolist(), "packed": packed.hex()})
    pathlib.Path(path).write_text(json.dumps(cases) + "\n")


def compare(path, decoded):
    ours = read_container(path)
    _, table, data = read_safetensors(decoded)
    assert sorted(ours) == sorted(table), set(ours) ^ set(table)
    for name, entry in table.items():
        start, end = entry["data_offsets"]
        assert list(ours[name].shape) == entry["shape"], name
        assert ours[name].astype("<f2").tobytes() == data[start:end], name
    print(f"{path}: {len(ours)} tensors equal to the last bit")


if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    {"make": make, "packing": packing, "compare": compare}[command](*arguments)
