//! The process's memory, where the system tells (Linux).

/// The most bytes that have been resident at once since the start, or since [`reset_peak`].
pub fn peak() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

/// Starts the peak anew from what is resident now. Whether that was possible.
pub fn reset_peak() -> bool {
    std::fs::write("/proc/self/clear_refs", "5").is_ok()
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_large_block_shows() {
        let Some(before) = super::peak() else { return };
        let block = vec![1u8; 256 << 20];
        assert!(super::peak().is_some_and(|after| after >= before.max(256 << 20)), "{before}");
        assert_eq!(block[block.len() - 1], 1);
    }
}
