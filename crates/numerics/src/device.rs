//! Devices and dtypes of tensors.

use std::sync::OnceLock;

use squeeze_base::error::{Error, Result};
use squeeze_base::shorten::shorten;
use tch::{Cuda, Device, Kind, Tensor};

/// The device of a part of a model, and the dtype that it computes in.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Placement {
    /// The device.
    pub device: Device,
    /// The dtype of weights and activations.
    pub kind: Kind,
}

impl Placement {
    /// fp32 on the CPU.
    pub const CPU: Placement = Placement { device: Device::Cpu, kind: Kind::Float };
}

/// Reads a device name: `cpu`, `cuda` (the first GPU), `cuda:N`, or `mps` (Apple's GPU, by Metal).
///
/// # Errors
/// [`Error::Argument`] for another name, and for a GPU that this machine or this libtorch does not
/// have.
pub fn parse_device(name: &str) -> Result<Device> {
    let index = match name {
        "cpu" => return Ok(Device::Cpu),
        "mps" if tch::utils::has_mps() => return Ok(Device::Mps),
        "mps" => {
            let why = "this libtorch computes on no GPU of Apple's; that of a Mac with an M chip and macOS 12.3 or later does";
            return Err(Error::Argument(format!("device `mps` is not there: {why}")));
        }
        "cuda" => 0,
        _ => match name.strip_prefix("cuda:").and_then(|n| n.parse::<u16>().ok()) {
            Some(index) => usize::from(index),
            None => return Err(Error::Argument(format!("unknown device `{}` (known: cpu, cuda, cuda:N, mps)", shorten(name)))),
        },
    };
    match cuda_devices() {
        Ok(count) if index < count => Ok(Device::Cuda(index)),
        Ok(count) => Err(Error::Argument(format!("device `{name}` is not there: this machine has {count} CUDA device(s)"))),
        Err(why) => Err(Error::Argument(format!("device `{name}` is not there: {why}"))),
    }
}

/// The number of CUDA devices, or why there are none.
///
/// libtorch's CUDA library is loaded here, on first use: runs on a CPU are spared its start-up time
/// and memory, and one binary works with a libtorch without CUDA too.
///
/// # Errors
/// A sentence for people.
pub fn cuda_devices() -> Result<usize, &'static str> {
    static COUNT: OnceLock<Result<usize, String>> = OnceLock::new();
    let count = COUNT.get_or_init(|| {
        load_cuda().map_err(|why| format!("this libtorch has no CUDA ({why})"))?;
        match Cuda::device_count() {
            count if count > 0 => Ok(count as usize),
            _ => Err("libtorch finds no NVIDIA GPU or driver".to_owned()),
        }
    });
    count.as_ref().map(|count| *count).map_err(String::as_str)
}

/// The dtype for activations beyond fp16: bf16, with the range of fp32 and the memory of fp16, or
/// fp32 where the device does not compute in bf16.
#[must_use]
pub fn beyond_half(device: Device) -> Kind {
    let computes_in_bf16 = || -> Result<()> {
        let ones = Tensor::f_ones([1, 1, 2, 2], (Kind::BFloat16, device))?;
        let convolved = ones.f_conv2d(&ones, None::<&Tensor>, [1, 1], [0, 0], [1, 1], 1)?;
        let _ = ones.f_flatten(0, 2)?.f_mm(&ones.f_flatten(0, 1)?.f_reshape([2, 2])?)?;
        // A device that only fails later fails here.
        convolved.f_double_value(&[0, 0, 0, 0])?;
        Ok(())
    };
    match device {
        Device::Cpu => Kind::BFloat16,
        Device::Cuda(_) if computes_in_bf16().is_ok() => Kind::BFloat16,
        // Metal has bf16 only on newer systems, and fallbacks to the CPU for some operations of it.
        Device::Cuda(_) | Device::Mps | Device::Vulkan => Kind::Float,
    }
}

/// Loads libtorch's CUDA backend, which registers itself with the libtorch that is already there.
fn load_cuda() -> Result<(), libloading::Error> {
    // SAFETY: the library comes from the rpath or the folder that this process's own libtorch comes
    // from, and is of one build with it; its initializers only register kernels and hooks. It is
    // never unloaded.
    let library = unsafe { libloading::Library::new(libloading::library_filename("torch_cuda")) }?;
    std::mem::forget(library);
    Ok(())
}

/// Reads a list of device names with commas between them, such as `cuda:0,cuda:1`.
///
/// # Errors
/// As [`parse_device`].
pub fn parse_devices(names: &str) -> Result<Vec<Device>> {
    names.split(',').map(|name| parse_device(name.trim())).collect()
}

/// Bytes of free memory of a device, if known.
#[must_use]
pub fn free_memory(device: Device) -> Option<u64> {
    match device {
        Device::Cpu => squeeze_base::memory::available(),
        Device::Cuda(index) => cuda_memory(index).map(|[free, _]| free),
        // The GPU of a Mac has no memory of its own.
        Device::Mps => squeeze_base::memory::available(),
        Device::Vulkan => None,
    }
}

/// Bytes of all memory of a GPU, if known.
#[must_use]
pub fn total_memory(device: Device) -> Option<u64> {
    match device {
        Device::Cuda(index) => cuda_memory(index).map(|[_, total]| total),
        Device::Cpu | Device::Mps | Device::Vulkan => None,
    }
}

/// Whether a device factors matrices. Metal's routines for that are recent and fewer, so factors
/// are made on the CPU.
#[must_use]
pub fn factors_matrices(device: Device) -> bool {
    match device {
        Device::Cpu | Device::Cuda(_) => true,
        Device::Mps | Device::Vulkan => false,
    }
}

/// Possible names of the CUDA runtime, given the process's memory map as Linux shows it
/// (`/proc/self/maps`): first the loaded libraries of such a name, as some libtorchs have a hash in
/// it; then the name of each version, the newest first.
#[cfg(unix)]
fn cuda_runtimes(map: &str) -> Vec<&str> {
    let paths = map.lines().filter_map(|line| line.find('/').and_then(|start| line.get(start..)));
    let mut names: Vec<&str> =
        paths.filter(|path| path.rsplit('/').next().is_some_and(|name| name.starts_with("libcudart"))).collect();
    names.dedup();
    names.extend(["libcudart.so.13", "libcudart.so.12", "libcudart.so.11.0", "libcudart.so"]);
    names
}

/// The CUDA runtime of libtorch, which is loaded already: this looks up its functions in the whole
/// process, or else the loaded library by its name.
#[cfg(unix)]
fn cuda_runtime() -> Option<libloading::os::unix::Library> {
    use libloading::os::unix::{Library, RTLD_NOW};
    /// Only a loaded library: a version other than libtorch's does not know its devices.
    const RTLD_NOLOAD: std::ffi::c_int = libc::RTLD_NOLOAD;
    let whole = Library::this();
    // SAFETY: the symbol is looked up and not used.
    if unsafe { whole.get::<unsafe extern "C" fn(i32) -> i32>(b"cudaSetDevice\0") }.is_ok() {
        return Some(whole);
    }
    // SAFETY: with RTLD_NOLOAD no library is loaded, so no initializer runs.
    let map = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    cuda_runtimes(&map).into_iter().find_map(|name| unsafe { Library::open(Some(name), RTLD_NOW | RTLD_NOLOAD) }.ok())
}

/// Free bytes and all bytes of GPU `index`, from the CUDA runtime.
#[cfg(unix)]
fn cuda_memory(index: usize) -> Option<[u64; 2]> {
    cuda_devices().ok()?;
    let runtime = cuda_runtime()?;
    // SAFETY: the runtime is the one that libtorch has loaded already; both functions are of its
    // stable C interface, with these signatures, and write to the two places that they are given,
    // which live until they return.
    unsafe {
        let set_device = runtime.get::<unsafe extern "C" fn(i32) -> i32>(b"cudaSetDevice\0").ok()?;
        let info = runtime.get::<unsafe extern "C" fn(*mut usize, *mut usize) -> i32>(b"cudaMemGetInfo\0").ok()?;
        let (mut free, mut total) = (0, 0);
        (set_device(i32::try_from(index).ok()?) == 0 && info(&mut free, &mut total) == 0).then_some([free as u64, total as u64])
    }
}

/// Only Unix has runtimes of these names.
#[cfg(not(unix))]
fn cuda_memory(_index: usize) -> Option<[u64; 2]> {
    None
}

/// Reads a dtype name: `f32`, `f16` or `bf16` (and `float32`, `float16`, `bfloat16`, `fp32`,
/// `fp16`).
///
/// # Errors
/// [`Error::Argument`] for another name.
pub fn parse_dtype(name: &str) -> Result<Kind> {
    match name {
        "f32" | "fp32" | "float32" => Ok(Kind::Float),
        "f16" | "fp16" | "float16" => Ok(Kind::Half),
        "bf16" | "bfloat16" => Ok(Kind::BFloat16),
        _ => Err(Error::Argument(format!("unknown dtype `{}` (known: f32, f16, bf16)", shorten(name)))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_and_dtypes_are_parsed_from_their_names() {
        assert_eq!(parse_device("cpu").unwrap(), Device::Cpu);
        for bad in ["", "gpu", "cuda:", "cuda:x", "cuda:-1", "cuda:99999999999"] {
            let message = parse_device(bad).unwrap_err().to_string();
            assert!(message.contains("unknown device"), "{bad}: {message}");
        }
        assert_eq!(parse_dtype("bf16").unwrap(), Kind::BFloat16);
        assert!(parse_dtype("int8").is_err());
    }

    #[test]
    fn metal_is_named_and_factors_no_matrices() {
        match parse_device("mps") {
            Ok(device) => assert_eq!(device, Device::Mps),
            Err(why) => assert!(why.to_string().contains("`mps` is not there: this libtorch computes on no GPU"), "{why}"),
        }
        assert!(parse_device("mps:0").unwrap_err().to_string().contains("known: cpu, cuda, cuda:N, mps"));
        assert_eq!((beyond_half(Device::Mps), beyond_half(Device::Cpu)), (Kind::Float, Kind::BFloat16));
        assert!(factors_matrices(Device::Cpu) && !factors_matrices(Device::Mps));
        assert_eq!(free_memory(Device::Mps).is_some(), free_memory(Device::Cpu).is_some());
    }

    #[cfg(unix)]
    #[test]
    fn the_runtime_is_looked_for_under_every_version_and_only_where_it_is_loaded() {
        let versions = ["libcudart.so.13", "libcudart.so.12", "libcudart.so.11.0", "libcudart.so"];
        assert_eq!(cuda_runtimes(""), versions);
        let map = "7f00-7f01 r-xp 00000000 08:01 42   /opt/a b/libcudart-d0da41ae.so.11.0\n\
                   7f01-7f02 r--p 00000000 08:01 42   /opt/a b/libcudart-d0da41ae.so.11.0\n\
                   7f02-7f03 rw-p 00000000 00:00 0\n7f03-7f04 r--p 00000000 08:01 43   /opt/libcudart/libother.so\n";
        assert_eq!(cuda_runtimes(map)[0], "/opt/a b/libcudart-d0da41ae.so.11.0");
        assert_eq!(cuda_runtimes(map)[1..], versions);
        if cuda_devices().is_err() {
            assert!(free_memory(Device::Cuda(0)).is_none() && total_memory(Device::Cuda(0)).is_none());
        } else {
            let free = free_memory(Device::Cuda(0)).unwrap();
            assert!(free > 0 && total_memory(Device::Cuda(0)).is_some_and(|total| total >= free));
        }
    }

    #[test]
    fn cuda_backend_registers_or_says_why() {
        // Loading must be harmless after CPU work has been done, with and without a GPU.
        let one = tch::Tensor::from(1.0f32);
        match cuda_devices() {
            Ok(count) => assert!(parse_device(&format!("cuda:{count}")).unwrap_err().to_string().contains("this machine has")),
            Err(why) => assert!(why.contains("no NVIDIA GPU") || why.contains("no CUDA"), "{why}"),
        }
        assert_eq!(one.double_value(&[]), 1.0);
    }
}
