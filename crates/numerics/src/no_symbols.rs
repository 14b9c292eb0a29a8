//! libtorch for Windows is built with another C++ interface, in which its functions have other
//! names: its settings stay as they are, and [`crate::Numerics::note`] reports that.

pub(crate) fn set_tf32(_allowed: bool) -> bool {
    false
}

pub(crate) fn mkl_strict() -> bool {
    false
}
