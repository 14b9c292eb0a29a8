"""Reads from a program what the loader of its system reads, without running it: ELF of Linux, Mach-O of macOS."""

import dataclasses
import hashlib
import struct


@dataclasses.dataclass
class Program:
    """What a loader needs to know."""

    # As in the tags of wheels: linux or macosx; x86_64, aarch64 or arm64.
    system: str
    machine: str
    # The libraries that it is linked to, and the folders in which they are looked for.
    libraries: list[str]
    folders: list[str]
    # macOS: the oldest release that starts it, and whether its signature is that of its bytes.
    oldest: str | None = None
    is_signed: bool = False


def read(data):
    """The `Program` in these bytes. Both formats are read as 64-bit and little-endian."""
    if data[:6] == b"\x7fELF\x02\x01":
        return elf(data)
    if data[:4] == b"\xcf\xfa\xed\xfe":
        return macho(data)
    raise ValueError(f"no program for Linux or macOS begins with {data[:6]}")


def elf(data):
    machine = {62: "x86_64", 183: "aarch64"}[struct.unpack_from("<H", data, 18)[0]]
    (table,) = struct.unpack_from("<Q", data, 32)
    size, count = struct.unpack_from("<HH", data, 54)
    # type, flags, offset, virtual address, physical address, bytes in the file, bytes in memory, alignment
    segments = [struct.unpack_from("<IIQQQQQQ", data, table + size * at) for at in range(count)]
    load, dynamic = 1, 2
    (_, _, start, _, _, length, _, _) = next(segment for segment in segments if segment[0] == dynamic)
    entries = list(struct.iter_unpack("<qQ", data[start : start + length]))
    entries = entries[: [tag for tag, _ in entries].index(0)]
    strings = dict(entries)[5]
    strings += next(at - address for kind, _, at, address, _, here, *_ in segments if kind == load and 0 <= strings - address < here)

    def texts(*tags):
        return [text(data, strings + value) for tag, value in entries if tag in tags]

    rpath, runpath = 15, 29
    folders = [folder for given in texts(rpath, runpath) for folder in given.split(":")]
    return Program("linux", machine, texts(1), folders)


def macho(data):
    machine = {0x0100_0007: "x86_64", 0x0100_000C: "arm64"}[struct.unpack_from("<I", data, 4)[0]]
    made = Program("macosx", machine, [], [])
    at = 32
    for _ in range(struct.unpack_from("<I", data, 16)[0]):
        kind, size = struct.unpack_from("<II", data, at)
        first, second = struct.unpack_from("<II", data, at + 8)
        # Loaded always, weakly, again for others, or on demand.
        if kind in (0xC, 0x8000_0018, 0x8000_001F, 0x20):
            made.libraries.append(text(data, at + first))
        elif kind == 0x8000_001C:
            made.folders.append(text(data, at + first))
        elif kind == 0x32:
            made.oldest = f"{second >> 16}.{second >> 8 & 0xFF}"
        elif kind == 0x1D:
            made.is_signed = signature_holds(data, data[first : first + second])
        at += size
    return made


def signature_holds(data, signature):
    """Whether each page of the program has the hash in its code directory: arm64 Macs start no other program."""
    magic, _, count = struct.unpack_from(">III", signature)
    if magic != 0xFADE0CC0:
        return False
    places = [struct.unpack_from(">II", signature, 12 + 8 * at)[1] for at in range(count)]
    (place,) = (place for place in places if struct.unpack_from(">I", signature, place)[0] == 0xFADE0C02)
    hashes, _, _, pages, limit = struct.unpack_from(">IIIII", signature, place + 16)
    length, kind, _, shift = signature[place + 36 : place + 40]
    if (length, kind) != (32, 2):
        return False
    starts = range(0, limit, 1 << shift)
    wanted = [signature[place + hashes + length * at :][:length] for at in range(pages)]
    return wanted == [hashlib.sha256(data[start : min(start + (1 << shift), limit)]).digest() for start in starts]


def text(data, at):
    return data[at : data.index(b"\0", at)].decode()
