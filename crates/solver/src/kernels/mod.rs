//! CUDA kernels: the steps of the solver that go column by column, conjugate gradients, and exact
//! palettes.
//!
//! They are compiled for the GPU at hand when they are first needed, by the NVRTC that comes with
//! libtorch, and run on libtorch's stream of the thread: the device's default stream, or one of
//! [`on_own_stream`].

mod descent;
mod palettes;
mod stream;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock};

use cudarc::driver::{CudaContext, CudaFunction, CudaStream, LaunchConfig, PushKernelArg};
use cudarc::nvrtc::{CompileError, Ptx, compile_ptx};
use squeeze_base::error::{Error, Result};
use tch::{Device, Kind, Tensor};

pub(crate) use self::descent::Descent;
pub(crate) use self::palettes::Groups;
pub use self::stream::{on_own_stream, ready_for_threads};

/// The kernels' source.
const SOURCE: &str =
    concat!(include_str!("half.cu"), include_str!("rows.cu"), include_str!("descent.cu"), include_str!("palettes.cu"));

/// The largest number of columns of a block.
pub(crate) const MOST_COLUMNS: i64 = 128;

/// The number of threads that work on one row.
const LANES: u32 = 32;

/// Whether [`Kernels::sweep`] can choose a mask within groups of m columns.
pub(crate) fn takes_groups_of(m: usize) -> bool {
    m > 0 && (LANES as usize).is_multiple_of(m)
}

/// Whether a device has kernels, with which one layer is solved as fast as several in a batch. A
/// CPU has none and needs none.
#[must_use]
pub fn has_kernels(device: Device) -> bool {
    Kernels::of(device).is_some()
}

/// The number of rows of a thread block.
const ROWS: u32 = 4;

/// The compiled kernels of one GPU.
#[derive(Debug)]
pub(crate) struct Kernels {
    stream: Arc<CudaStream>,
    sweep: CudaFunction,
    polish: CudaFunction,
    descend: CudaFunction,
    count_values: CudaFunction,
    collect_values: CudaFunction,
    cut_values: CudaFunction,
    look_up: CudaFunction,
}

/// Palettes [groups, entries], fp32 and ascending, of which each is that of `group_rows` rows.
#[derive(Clone, Copy)]
pub(crate) struct DevicePalettes<'a> {
    pub entries: &'a Tensor,
    pub group_rows: i64,
}

impl Kernels {
    /// The kernels for a device; `None` if it is no CUDA GPU, or NVRTC is not there. Then a warning
    /// is logged, once for each GPU.
    pub(crate) fn of(device: Device) -> Option<Arc<Kernels>> {
        static KNOWN: OnceLock<Mutex<HashMap<usize, Option<Arc<Kernels>>>>> = OnceLock::new();
        let Device::Cuda(ordinal) = device else { return None };
        let mut known = KNOWN.get_or_init(Mutex::default).lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let load = || match Self::load(ordinal) {
            Ok(kernels) => Some(Arc::new(kernels)),
            Err(why) => {
                tracing::warn!("cuda:{ordinal}: no kernels ({why}); steps that go column by column are slow");
                None
            }
        };
        known.entry(ordinal).or_insert_with(load).clone()
    }

    fn load(ordinal: usize) -> Result<Self, String> {
        let ptx = compile()?;
        // SAFETY: this only opens the driver's library, which libtorch has opened already.
        if !unsafe { cudarc::driver::sys::is_culib_present() } {
            return Err("the driver's library is not found".to_owned());
        }
        // The primary context of the device, which libtorch uses too.
        let context = CudaContext::new(ordinal).map_err(|error| error.to_string())?;
        let module = context.load_module(ptx).map_err(|error| error.to_string())?;
        let function = |name| module.load_function(name).map_err(|error| error.to_string());
        Ok(Kernels {
            stream: context.default_stream(),
            sweep: function("sweep")?,
            polish: function("polish")?,
            descend: function("descend")?,
            count_values: function("count_values")?,
            collect_values: function("collect_values")?,
            cut_values: function("cut_values")?,
            look_up: function("look_up")?,
        })
    }

    /// Rounds a block of columns with error feedback; see `sweep` in the source.
    ///
    /// `values` [rows, b] and `upper` [b, b] are fp32 and contiguous; `keep` [rows, b] of bool or
    /// u8, a view; palettes come with a view [rows, b] of their indices, u8; `squares` `[rows]`,
    /// fp64. `ratio` (n, m) chooses the mask here; m must divide 32.
    pub(crate) fn sweep(
        &self,
        values: &Tensor,
        upper: &Tensor,
        keep: Option<&Tensor>,
        palettes: Option<(DevicePalettes<'_>, &Tensor)>,
        squares: Option<&Tensor>,
        ratio: Option<(usize, usize)>,
    ) -> Result<()> {
        let (rows, width) = values.size2()?;
        plain(values, [rows, width], Kind::Float)?;
        plain(upper, [width, width], Kind::Float)?;
        if let Some(squares) = squares {
            plain(squares, [rows, 1], Kind::Double)?;
        }
        if width > MOST_COLUMNS || ratio.is_some_and(|(_, m)| !takes_groups_of(m) || keep.is_none()) {
            return Err(Error::internal("a block that the kernels cannot sweep"));
        }
        let views: Vec<&Tensor> = keep.into_iter().chain(palettes.map(|(_, indices)| indices)).collect();
        let stride = row_stride(&views, [rows, width])?;
        let (group_rows, entries) = palettes.map_or(Ok((1, 1)), |(palettes, _)| palettes.sizes(rows))?;
        let pointer = |tensor: Option<&Tensor>| tensor.map_or(0_u64, |tensor| tensor.data_ptr() as u64);
        let pointers = [
            pointer(Some(values)),
            pointer(Some(upper)),
            pointer(keep),
            pointer(palettes.map(|(palettes, _)| palettes.entries)),
            pointer(palettes.map(|(_, indices)| indices)),
            pointer(squares),
        ];
        let (n, m) = ratio.unwrap_or((0, 0));
        let numbers = numbers([rows, width, stride, group_rows, entries, n as i64, m as i64])?;
        self.launch(&self.sweep, &pointers, &numbers)
    }

    /// Coordinate descent over the indices of a block of columns; see `polish` in the source.
    ///
    /// `gradient` [rows, b] and `corner` [b, b] are fp32 and contiguous; `keep` (bool), `indices`
    /// (u8) and `change` (fp32) are views [rows, b] of matrices of one width; `changed` `[rows]`,
    /// 32-bit integers.
    #[expect(clippy::too_many_arguments, reason = "they are those of the kernel")]
    pub(crate) fn polish(
        &self,
        gradient: &Tensor,
        corner: &Tensor,
        keep: Option<&Tensor>,
        palettes: DevicePalettes<'_>,
        indices: &Tensor,
        change: &Tensor,
        changed: &Tensor,
        passes: usize,
    ) -> Result<()> {
        let (rows, width) = gradient.size2()?;
        plain(gradient, [rows, width], Kind::Float)?;
        plain(corner, [width, width], Kind::Float)?;
        plain(changed, [rows, 1], Kind::Int)?;
        if width > MOST_COLUMNS || change.f_kind()? != Kind::Float {
            return Err(Error::internal("a block that the kernels cannot polish"));
        }
        let views: Vec<&Tensor> = keep.into_iter().chain([indices, change]).collect();
        let stride = row_stride(&views, [rows, width])?;
        let (group_rows, entries) = palettes.sizes(rows)?;
        let pointers = [gradient, corner].map(|tensor| tensor.data_ptr() as u64).into_iter();
        let pointers = pointers.chain([keep.map_or(0, |keep| keep.data_ptr() as u64)]);
        let rest = [palettes.entries, indices, change, changed].map(|tensor| tensor.data_ptr() as u64);
        let pointers: Vec<u64> = pointers.chain(rest).collect();
        let numbers = numbers([rows, width, stride, group_rows, entries, passes as i64])?;
        self.launch(&self.polish, &pointers, &numbers)
    }

    /// Launches a kernel of rows, whose arguments are pointers, then numbers; the first number is
    /// that of the rows.
    fn launch(&self, function: &CudaFunction, pointers: &[u64], numbers: &[i32]) -> Result<()> {
        let numbers: Vec<Number> = numbers.iter().copied().map(Number::Int).collect();
        let Some(Number::Int(rows)) = numbers.first() else { return Err(Error::internal("a kernel of no rows")) };
        self.start(function, pointers, &numbers, [rows.unsigned_abs().div_ceil(ROWS), 1], LANES * ROWS)
    }

    /// Launches a kernel whose arguments are pointers, then numbers, on `blocks` of `threads`.
    fn start(&self, function: &CudaFunction, pointers: &[u64], numbers: &[Number], blocks: [u32; 2], threads: u32) -> Result<()> {
        let own = stream::current();
        let mut launch = own.as_ref().unwrap_or(&self.stream).launch_builder(function);
        for pointer in pointers {
            launch.arg(pointer);
        }
        for number in numbers {
            match number {
                Number::Int(number) => launch.arg(number),
                Number::Long(number) => launch.arg(number),
            };
        }
        let config = LaunchConfig { grid_dim: (blocks[0], blocks[1], 1), block_dim: (threads, 1, 1), shared_mem_bytes: 0 };
        // SAFETY: the callers have checked dtypes, sizes and strides of the tensors behind the
        // pointers, all on this device; the kernels stay inside of them. libtorch works on the same
        // stream, so that the memory is not reused before the kernel has run.
        unsafe { launch.launch(config) }.map_err(|error| Error::internal(format!("a kernel could not be launched: {error}")))?;
        Ok(())
    }
}

/// A number among a kernel's arguments.
#[derive(Debug, Clone, Copy)]
enum Number {
    Int(i32),
    Long(i64),
}

impl DevicePalettes<'_> {
    /// The number of rows of a palette, and of its entries.
    fn sizes(&self, rows: i64) -> Result<(i64, i64)> {
        let (groups, entries) = self.entries.size2()?;
        plain(self.entries, [groups, entries], Kind::Float)?;
        if !(1..=256).contains(&entries) || self.group_rows < 1 || groups * self.group_rows < rows {
            return Err(Error::internal("palettes that are not those of the rows"));
        }
        Ok((self.group_rows, entries))
    }
}

/// Compiles the kernels for the oldest GPUs that this CUDA knows; the driver translates the result
/// for its own.
fn compile() -> Result<Ptx, String> {
    find_nvrtc();
    // SAFETY: this only opens NVRTC, whose initializers touch nothing of ours.
    if !unsafe { cudarc::nvrtc::sys::is_culib_present() } {
        return Err("NVRTC is not found".to_owned());
    }
    compile_ptx(SOURCE).map_err(|error| match error {
        CompileError::CompileError { log, .. } => format!("they do not compile: {}", log.to_string_lossy()),
        other => other.to_string(),
    })
}

/// Loads the library of libtorch that links NVRTC, so that NVRTC is found wherever libtorch has it.
fn find_nvrtc() {
    // SAFETY: the library is libtorch's own and of one build with it; it only holds pointers to
    // NVRTC's functions. It is never unloaded.
    if let Ok(library) = unsafe { libloading::Library::new(libloading::library_filename("caffe2_nvrtc")) } {
        std::mem::forget(library);
    }
}

/// Refuses a tensor that is not contiguous, or of another size or dtype. A vector counts as one
/// column.
fn plain(tensor: &Tensor, size: [i64; 2], kind: Kind) -> Result<()> {
    let is_vector = size[1] == 1 && tensor.size() == [size[0]];
    if (tensor.size() == size || is_vector) && tensor.is_contiguous() && tensor.f_kind()? == kind {
        return Ok(());
    }
    Err(Error::internal(format!("a kernel needs {size:?} of {kind:?}, not {:?} of {:?}", tensor.size(), tensor.kind())))
}

/// The distance of the rows of views [rows, b] of matrices, which must be the same for all: of one
/// byte an element, or fp32.
fn row_stride(views: &[&Tensor], size: [i64; 2]) -> Result<i64> {
    let mut stride = size[1];
    for (at, view) in views.iter().enumerate() {
        let strides = view.stride();
        let is_known = matches!(view.f_kind()?, Kind::Bool | Kind::Uint8 | Kind::Float);
        if view.size() != size || strides[1] != 1 || !is_known || (at > 0 && strides[0] != stride) {
            return Err(Error::internal("views that the kernels cannot work on"));
        }
        stride = strides[0];
    }
    Ok(stride)
}

fn numbers<const N: usize>(numbers: [i64; N]) -> Result<Vec<i32>> {
    let numbers: Result<Vec<i32>, _> = numbers.into_iter().map(i32::try_from).collect();
    numbers.map_err(|_| Error::internal("a matrix that is too large for the kernels"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_compile() {
        match compile() {
            Ok(ptx) => {
                let ptx = String::from_utf8_lossy(ptx.as_bytes().unwrap()).into_owned();
                for kernel in ["sweep", "polish", "descend", "count_values", "collect_values", "cut_values", "look_up"] {
                    assert!(ptx.contains(&format!(".entry {kernel}")), "{kernel}");
                }
            }
            Err(why) => assert_eq!(why, "NVRTC is not found"),
        }
    }
}
