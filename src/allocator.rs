//! Settings of the system's allocator.

/// Lets glibc reuse freed blocks of up to 1 GiB instead of giving each back to the system.
///
/// libtorch allocates every activation anew. glibc by itself maps blocks above a threshold (32 MiB
/// at most) from the system and unmaps them when freed, and the system clears every page again: a
/// tenth of a full-size forward. On systems other than Linux with glibc this does nothing.
pub fn reuse_large_blocks() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        const LARGE: libc::c_int = 1 << 30;
        // SAFETY: mallopt only sets parameters of the allocator, under its lock, and may be called
        // at any time.
        let accepted =
            unsafe { libc::mallopt(libc::M_MMAP_THRESHOLD, LARGE) == 1 && libc::mallopt(libc::M_TRIM_THRESHOLD, LARGE) == 1 };
        if !accepted {
            tracing::debug!("glibc refuses the allocator's settings; large tensors are mapped anew each time");
        }
    }
}

/// Returns the freed memory that glibc keeps to the system.
///
/// Useful before a large allocation of other sizes than the freed blocks, which could not reuse
/// them.
pub fn give_back() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: malloc_trim only releases pages of free blocks, under the allocator's locks, and may
    // be called at any time.
    unsafe {
        libc::malloc_trim(0);
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn blocks_keep_their_content_when_memory_is_given_back() {
        super::reuse_large_blocks();
        let blocks: Vec<Vec<u8>> = (0..8).map(|i| vec![i; 48 << 20]).collect();
        super::give_back();
        assert!(blocks.iter().enumerate().all(|(i, block)| block[block.len() - 1] == i as u8));
    }
}
