#!/bin/sh
# Runs a command that compiles for another machine: sh scripts/cross.sh TARGET COMMAND [ARGUMENT ...]
#
#   sh scripts/cross.sh aarch64-unknown-linux-gnu cargo build --release     needs Debian's g++-aarch64-linux-gnu
#   sh scripts/cross.sh aarch64-apple-darwin cargo build --release          needs zig: $ZIG, or `pip install ziglang`
#   sh scripts/cross.sh x86_64-pc-windows-gnu cargo check                   needs Debian's gcc-mingw-w64-x86-64
#
# The libtorch of the target is PyPI's wheel of torch, unpacked once into target/torch/TARGET. Windows needs none: nothing is linked.
set -eu

version=2.11.0
[ $# -ge 2 ] || { sed -n '2,8s/^# \{0,1\}//p' "$0" >&2; exit 2; }
target=$1
shift
root=$(cd "$(dirname "$0")/.." && pwd -P)
folder=$root/target/torch/$target
# Its full path: the compilers run where another Python may be the first.
python=$(command -v "${PYTHON:-python3}")

# Unpacks into a folder beside its last place, which takes its name when all is there.
partial=$folder.partial-$$

# Unpacks the wheel $1 for the platform $2: the files that programs are compiled and run with.
fetch() {
    "$python" -m pip download --quiet --no-deps --only-binary :all: --python-version 312 --platform "$2" --dest "$partial/wheels" "$1" >&2
    "$python" - "$partial" <<'PYTHON'
import pathlib, sys, zipfile
folder = pathlib.Path(sys.argv[1])
wanted = ("torch/lib/", "torch/include/", "torch/version.py", "nvidia/")
for wheel in (folder / "wheels").iterdir():
    with zipfile.ZipFile(wheel) as files:
        files.extractall(folder, [name for name in files.namelist() if name.startswith(wanted)])
    wheel.unlink()
PYTHON
}

case $target in
aarch64-unknown-linux-gnu)
    # libtorch_cpu.so is linked to two small libraries of CUDA. libtorch.so is linked to libtorch_cuda.so, and that to 2 GB of others:
    # an empty library in its place is enough to link the program and to run it without a GPU.
    [ -d "$folder" ] || {
        fetch "torch==$version" manylinux_2_28_aarch64
        fetch "nvidia-cuda-runtime==13.0.*" manylinux2014_aarch64
        fetch "nvidia-cuda-cupti==13.0.*" manylinux_2_25_aarch64
        aarch64-linux-gnu-gcc -shared -Wl,-soname,libtorch_cuda.so -x c /dev/null -o "$partial/torch/lib/libtorch_cuda.so"
        mv "$partial" "$folder"
    }
    export LIBTORCH="$folder/torch" STRIP=aarch64-linux-gnu-strip
    export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
    # QEMU runs the programs and the tests, in the folder of Debian's C library for this processor. Where the kernel knows QEMU
    # (Debian's qemu-user-binfmt), it also runs the programs that tests start.
    export QEMU_LD_PREFIX=/usr/aarch64-linux-gnu
    export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER=qemu-aarch64
    ;;
aarch64-apple-darwin)
    [ -d "$folder" ] || {
        fetch "torch==$version" macosx_11_0_arm64
        mv "$partial" "$folder"
    }
    zig=${ZIG:-"$python -m ziglang"}
    # zig would link its own C++ library for `-lc++`: macos_libcxx.py says why it must not.
    mkdir -p "$folder/bin"
    "$python" "$root/scripts/macos_libcxx.py" "$folder/bin" "$folder/torch/lib/libtorch_cpu.dylib" "$folder/torch/lib/libtorch_python.dylib"
    # The annotations keep the headers to what the C++ library of macOS 11 has.
    annotations="-U_LIBCPP_HAS_VENDOR_AVAILABILITY_ANNOTATIONS -D_LIBCPP_HAS_VENDOR_AVAILABILITY_ANNOTATIONS=1"
    for tool in "cc -L$folder/bin" "c++ $annotations -fno-sized-deallocation"; do
        # zig has names of its own for the machine, and refuses Apple's.
        cat >"$folder/bin/${tool%% *}" <<TOOL
#!/bin/sh
before=
for argument; do
    shift
    case \$before\$argument in
    -arch* | --target=* | -mmacosx-version-min=*) ;;
    -lc++) set -- "\$@" -lc++.1 ;;
    *) set -- "\$@" "\$argument" ;;
    esac
    before=
    [ "\$argument" != -arch ] || before=-arch
done
exec $zig $tool -target aarch64-macos.11.0 -fno-sanitize=undefined "\$@"
TOOL
        chmod +x "$folder/bin/${tool%% *}"
    done
    printf '#!/bin/sh\nexec %s ar "$@"\n' "$zig" >"$folder/bin/ar"
    chmod +x "$folder/bin/ar"
    export LIBTORCH="$folder/torch" MACOSX_DEPLOYMENT_TARGET=11.0
    export CC_aarch64_apple_darwin="$folder/bin/cc" CXX_aarch64_apple_darwin="$folder/bin/c++" AR_aarch64_apple_darwin="$folder/bin/ar"
    export CARGO_TARGET_AARCH64_APPLE_DARWIN_LINKER="$folder/bin/cc"
    ;;
*-windows-*)
    # torch-sys compiles nothing for its documentation, and `cargo check` needs no more.
    if [ "$1" = cargo ]; then
        set -- "$@" --features torch-sys/doc-only
    fi
    ;;
*)
    echo "cross.sh: $target is none of aarch64-unknown-linux-gnu, aarch64-apple-darwin and x86_64-pc-windows-gnu" >&2
    exit 2
    ;;
esac
export CARGO_BUILD_TARGET="$target"
exec "$@"
