//! What macOS reports through `getrusage` and the Mach kernel.

/// `ru_maxrss`, which macOS counts in bytes (Linux: in KiB).
pub(super) fn peak() -> Option<u64> {
    // SAFETY: getrusage writes the record that it is given, which lives until the call returns; a
    // record of numbers may begin as zeros.
    let usage = unsafe {
        let mut usage = std::mem::zeroed::<libc::rusage>();
        (libc::getrusage(libc::RUSAGE_SELF, &raw mut usage) == 0).then_some(usage)?
    };
    u64::try_from(usage.ru_maxrss).ok()
}

/// The system keeps one peak for the life of the process.
pub(super) fn reset_peak() -> bool {
    false
}

/// Free and inactive pages, which psutil calls available too.
#[allow(deprecated, reason = "libc refers to the crate mach2 for Mach calls; two of them need no crate")]
pub(super) fn available() -> Option<u64> {
    // SAFETY: host_statistics64 writes at most `count` integers into the record, which lives until
    // the call returns, and sysconf only reads a number.
    let (pages, page_bytes) = unsafe {
        let mut statistics = std::mem::zeroed::<libc::vm_statistics64>();
        let mut count = libc::HOST_VM_INFO64_COUNT;
        let record = (&raw mut statistics).cast();
        if libc::host_statistics64(libc::mach_host_self(), libc::HOST_VM_INFO64, record, &raw mut count) != libc::KERN_SUCCESS {
            return None;
        }
        (u64::from(statistics.free_count) + u64::from(statistics.inactive_count), libc::sysconf(libc::_SC_PAGESIZE))
    };
    Some(pages * u64::try_from(page_bytes).ok()?)
}
