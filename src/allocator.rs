//! How freed memory is kept for the next tensor.

/// Lets glibc reuse freed blocks of up to 1 GiB instead of giving each back to the system.
///
/// libtorch allocates every activation anew. glibc maps blocks above a threshold (32 MiB at most, by itself) from the system and
/// unmaps them when freed, and the system clears every page again: a tenth of a full-size forward. Call it once at the start of a
/// program; it does nothing elsewhere than on Linux with glibc.
pub fn reuse_large_blocks() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        const LARGE: libc::c_int = 1 << 30;
        // SAFETY: mallopt only sets parameters of the allocator, under its own lock, and may be called at any time.
        let kept =
            unsafe { libc::mallopt(libc::M_MMAP_THRESHOLD, LARGE) == 1 && libc::mallopt(libc::M_TRIM_THRESHOLD, LARGE) == 1 };
        if !kept {
            tracing::debug!("glibc does not take allocator settings; tensors are mapped anew each time");
        }
    }
}

/// Gives freed memory that glibc keeps back to the system: before something large is made of other sizes than what was freed, which
/// would otherwise lie beside it.
pub fn give_back() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: malloc_trim only releases pages of free blocks, under the allocator's own locks, and may be called at any time.
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
