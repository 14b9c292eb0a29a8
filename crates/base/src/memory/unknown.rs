//! Systems whose reports this program does not read.

pub(super) fn peak() -> Option<u64> {
    None
}

pub(super) fn reset_peak() -> bool {
    false
}

pub(super) fn available() -> Option<u64> {
    None
}
