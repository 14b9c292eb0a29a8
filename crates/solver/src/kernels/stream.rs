//! Streams of a GPU, one for each thread that solves, so that the small kernels of several layers
//! run beside one another.

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use cudarc::driver::{CudaContext, CudaStream};
use squeeze_base::error::Result;
use tch::{Device, Kind, Tensor};

thread_local! {
    /// The stream that the thread works on, where it is not the default one.
    static CURRENT: std::cell::RefCell<Option<Arc<CudaStream>>> = const { std::cell::RefCell::new(None) };
}

/// Runs `work` with a stream of its own for this thread's operations on `device`. When it returns,
/// all of them have ended. Elsewhere than on a CUDA GPU, `work` just runs.
///
/// Tensors that `work` uses must not be dropped by it, because their memory belongs to the default
/// stream, whose operations would not wait for this one's.
pub fn on_own_stream<T>(device: Device, work: impl FnOnce() -> T) -> T {
    let lent = match device {
        Device::Cuda(ordinal) => Lent::new(ordinal),
        _ => None,
    };
    if lent.is_none() && matches!(device, Device::Cuda(_)) {
        tracing::debug!("{device:?}: no stream of its own for this layer, which shares the default one");
    }
    let result = work();
    drop(lent);
    result
}

/// Makes a GPU ready for several threads. To be called before the first of them begins: libtorch
/// loads its linear algebra with the first factorization, and refuses if two threads are first.
///
/// # Errors
/// If libtorch refuses.
pub fn ready_for_threads(device: Device) -> Result<()> {
    static IS_READY: Mutex<bool> = Mutex::new(false);
    let mut is_ready = IS_READY.lock().unwrap_or_else(PoisonError::into_inner);
    if matches!(device, Device::Cuda(_)) && !*is_ready {
        let _ = Tensor::f_eye(2, (Kind::Float, device))?.f_linalg_cholesky_ex(false, false)?;
        *is_ready = true;
    }
    Ok(())
}

/// The stream that libtorch's operations of this thread run on, if it is not the default one.
pub(super) fn current() -> Option<Arc<CudaStream>> {
    CURRENT.with_borrow(Clone::clone)
}

/// libtorch's functions that set the stream of a thread; of its stable C interface
/// (`torch/csrc/inductor/aoti_torch/c/shim.h`).
struct Guards {
    create: unsafe extern "C" fn(*mut c_void, i32, *mut *mut c_void) -> i32,
    delete: unsafe extern "C" fn(*mut c_void) -> i32,
}

impl Guards {
    /// The functions; `None` if this libtorch does not have them.
    fn get() -> Option<&'static Self> {
        static GUARDS: OnceLock<Option<Guards>> = OnceLock::new();
        let load = || {
            // SAFETY: libtorch has loaded this library already, because there is a tensor on a GPU.
            // The functions have the signatures of the header; the library is never unloaded.
            unsafe {
                let library = libloading::Library::new(libloading::library_filename("torch_cuda")).ok()?;
                let guards = Guards {
                    create: *library.get(b"aoti_torch_create_cuda_stream_guard\0").ok()?,
                    delete: *library.get(b"aoti_torch_delete_cuda_stream_guard\0").ok()?,
                };
                std::mem::forget(library);
                Some(guards)
            }
        };
        let guards = GUARDS.get_or_init(load).as_ref();
        if guards.is_none() {
            tracing::debug!("this libtorch cannot set streams; layers share the default one");
        }
        guards
    }
}

/// Streams that no thread works on, by GPU. They are used again, because libtorch keeps memory for
/// each.
fn idle() -> &'static Mutex<HashMap<usize, Vec<Arc<CudaStream>>>> {
    static IDLE: OnceLock<Mutex<HashMap<usize, Vec<Arc<CudaStream>>>>> = OnceLock::new();
    IDLE.get_or_init(Mutex::default)
}

/// A stream that is this thread's for as long as this lives.
struct Lent {
    ordinal: usize,
    stream: Arc<CudaStream>,
    guards: &'static Guards,
    guard: *mut c_void,
}

impl Lent {
    /// A stream that begins once the default one has done what it was given so far; `None` if
    /// something lacks.
    fn new(ordinal: usize) -> Option<Self> {
        let guards = Guards::get()?;
        // SAFETY: this only opens the driver's library, which libtorch has opened already.
        if !unsafe { cudarc::driver::sys::is_culib_present() } {
            return None;
        }
        let used = idle().lock().unwrap_or_else(PoisonError::into_inner).get_mut(&ordinal).and_then(Vec::pop);
        let stream = match used {
            Some(stream) => stream,
            None => CudaContext::new(ordinal).ok()?.new_stream().ok()?,
        };
        stream.join(&stream.context().default_stream()).ok()?;
        let mut guard = std::ptr::null_mut();
        // SAFETY: the stream is one of this device and lives longer than the guard, which this
        // thread deletes when this is dropped; the place for the guard is a local.
        let status = unsafe { (guards.create)(stream.cu_stream().cast(), i32::try_from(ordinal).ok()?, &raw mut guard) };
        if status != 0 {
            return None;
        }
        CURRENT.set(Some(Arc::clone(&stream)));
        Some(Lent { ordinal, stream, guards, guard })
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        CURRENT.set(None);
        // An operation that failed says so when its result is read.
        let _ = self.stream.synchronize();
        // SAFETY: the guard is the one that this thread made, and is deleted once. Guards of a
        // thread are deleted in the reverse order, because each lives inside of one call.
        unsafe { (self.guards.delete)(self.guard) };
        let mut idle = idle().lock().unwrap_or_else(PoisonError::into_inner);
        idle.entry(self.ordinal).or_default().push(Arc::clone(&self.stream));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_on_a_cpu_just_runs() {
        assert_eq!(on_own_stream(Device::Cpu, || 3), 3);
        assert!(current().is_none());
        ready_for_threads(Device::Cpu).unwrap();
    }
}
