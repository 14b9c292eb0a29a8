//! The choice of the samples that are held out.

/// Whether the batch `index` of `count` is held out of the Hessians, to validate the joint solver
/// on: every 16th batch, or the middle one of 8 to 15.
pub(crate) fn is_held_out(index: usize, count: usize) -> bool {
    if (8..16).contains(&count) { index == count / 2 } else { index % 16 == 15 }
}

#[cfg(test)]
mod tests {
    use super::is_held_out;

    #[test]
    fn few_batches_hold_out_one_and_very_few_none() {
        let held_out = |count: usize| (0..count).filter(|index| is_held_out(*index, count)).collect::<Vec<_>>();
        assert_eq!(held_out(7), [0; 0]);
        assert_eq!(held_out(8), [4]);
        assert_eq!(held_out(15), [7]);
        assert_eq!(held_out(33), [15, 31]);
    }
}
