//! Reuse of freed memory for the next tensor.

/// Lets glibc reuse freed blocks of up to 1 GiB instead of giving each back to the system.
///
/// libtorch allocates every activation anew. glibc maps blocks above a threshold (by default at
/// most 32 MiB) from the system and unmaps them when they are freed, and the system clears the
/// pages of every new block: a tenth of the time of a full-size forward. Call this function once at
/// the start of a program. Without glibc it does nothing.
pub fn reuse_large_blocks() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        const LARGE: libc::c_int = 1 << 30;
        // SAFETY: mallopt only sets parameters of the allocator, under the allocator's lock, and
        // may be called at any time.
        let kept =
            unsafe { libc::mallopt(libc::M_MMAP_THRESHOLD, LARGE) == 1 && libc::mallopt(libc::M_TRIM_THRESHOLD, LARGE) == 1 };
        if !kept {
            tracing::debug!("glibc refused the allocator's settings; every tensor is mapped anew");
        }
    }
}

/// Returns freed memory that glibc keeps to the system. Call it before large blocks are allocated
/// that do not fit into the freed ones, and would need as much memory again.
pub fn give_back() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: malloc_trim only releases pages of free blocks, under the allocator's own locks, and
    // may be called at any time.
    unsafe {
        libc::malloc_trim(0);
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn memory_works_as_before() {
        super::reuse_large_blocks();
        let blocks: Vec<Vec<u8>> = (0..8).map(|i| vec![i; 48 << 20]).collect();
        super::give_back();
        assert!(blocks.iter().enumerate().all(|(i, block)| block[block.len() - 1] == i as u8));
    }
}
