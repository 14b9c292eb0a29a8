"""Writes stubs of macOS's C++ library and of its iconv, so that zig links programs to them: macos_libcxx.py FOLDER LIBRARY...

zig has a C++ library of its own, which it would put into the program. But an exception that libtorch throws is caught only by
code that shares its C++ library. So the program has to be linked to `/usr/lib/libc++.1.dylib`, of which only Apple has the file:
the stub (`.tbd`) lists in its place what PyPI's libtorch for macOS takes from it, and a few names that are as old. Rust's crate libc links every program to iconv, which zig does not have.
"""

import pathlib
import struct
import sys

INSTALLED = "/usr/lib/libc++.1.dylib"
# Of strings, streams, shared pointers and memory: in every release of macOS with libc++. Of threads that wait for a value, as
# those of the crate faer do: since macOS 11. LLVM's list of what Apple's library has: libcxx/lib/abi/arm64-apple-darwin*.abilist
OLD = [
    "__ZNSt3__120__libcpp_atomic_waitEPVKvx",
    "__ZNSt3__123__cxx_atomic_notify_allEPVKv",
    "__ZNSt3__123__libcpp_atomic_monitorEPVKv",
    "__ZNSt3__112basic_stringIcNS_11char_traitsIcEENS_9allocatorIcEEE6__initEPKcm",
    "__ZNSt3__112basic_stringIcNS_11char_traitsIcEENS_9allocatorIcEEE6__initEmc",
    "__ZNSt3__112basic_stringIcNS_11char_traitsIcEENS_9allocatorIcEEEC1ERKS5_mmRKS4_",
    "__ZNSt3__117iostream_categoryEv",
    "__ZNSt3__18ios_base7failureC1EPKcRKNS_10error_codeE",
    "__ZNSt3__18ios_base7failureD1Ev",
    "__ZTVNSt3__114__shared_countE",
    "__ZTVNSt3__115basic_streambufIcNS_11char_traitsIcEEEE",
    "__ZTVNSt3__119__shared_weak_countE",
    "__ZTVNSt3__18ios_baseE",
    "__ZdlPvm",
]


def imports(data):
    """The names that a Mach-O library for arm64 takes from the system's C++ library."""
    if data[:4] != b"\xcf\xfa\xed\xfe":
        raise ValueError("no library for a 64-bit Mac")
    libraries, at, symbols = [], 32, None
    for _ in range(struct.unpack_from("<I", data, 16)[0]):
        kind, size = struct.unpack_from("<II", data, at)
        # Loaded always, weakly, again for others, or upward.
        if kind in (0xC, 0x8000_0018, 0x8000_001F, 0x8000_0023):
            start = at + struct.unpack_from("<I", data, at + 8)[0]
            libraries.append(data[start : data.index(b"\0", start)].decode())
        elif kind == 0x2:
            symbols = struct.unpack_from("<IIII", data, at + 8)
        at += size
    entries, count, texts, _ = symbols
    for text, kind, _, about, _ in struct.iter_unpack("<IBBHQ", data[entries : entries + 16 * count]):
        # Undefined and external; the upper byte counts the libraries from 1.
        order = about >> 8
        if kind & 0x0F == 0x01 and 1 <= order <= len(libraries) and libraries[order - 1] == INSTALLED:
            start = texts + text
            yield data[start : data.index(b"\0", start)].decode()


def write_stub(path, installed, names):
    lines = ["--- !tapi-tbd", "tbd-version: 4", "targets: [ arm64-macos ]", f"install-name: '{installed}'", "exports:"]
    lines += ["  - targets: [ arm64-macos ]", f"    symbols: [ {', '.join(names)} ]", "..."]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main():
    folder, *libraries = map(pathlib.Path, sys.argv[1:])
    names = {name for library in libraries for name in imports(library.read_bytes())}
    write_stub(folder / "libc++.1.tbd", INSTALLED, sorted(names.union(OLD)))
    write_stub(folder / "libiconv.tbd", "/usr/lib/libiconv.2.dylib", ["_iconv", "_iconv_close", "_iconv_open"])


if __name__ == "__main__":
    main()
