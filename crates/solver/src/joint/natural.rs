//! The natural order of a weight's columns, and the order of the factors.

use rayon::prelude::*;

use super::factors::JointFactors;

/// Converts between the order of the factors' columns and the natural order.
pub(super) struct Natural<'a> {
    /// The natural place of each column, for each part.
    orders: Vec<Option<&'a [usize]>>,
    part_rows: usize,
    columns: usize,
}

impl<'a> Natural<'a> {
    pub(super) fn new(factors: &'a JointFactors, rows: usize, columns: usize) -> Self {
        let orders = factors.parts.iter().map(|part| part.order.as_deref()).collect();
        Natural { orders, part_rows: rows / factors.parts.len(), columns }
    }

    fn each_row<T: Copy + Send + Sync>(&self, values: &mut [T], place: impl Fn(&mut [T], &[T], &[usize]) + Sync) {
        values.par_chunks_mut(self.columns).enumerate().for_each(|(row, values)| {
            if let Some(order) = self.orders[row / self.part_rows] {
                let old = values.to_vec();
                place(values, &old, order);
            }
        });
    }

    /// Converts from natural order to that of the factors.
    pub(super) fn sort<T: Copy + Send + Sync>(&self, values: &mut [T]) {
        self.each_row(values, |new, old, order| new.iter_mut().zip(order).for_each(|(new, from)| *new = old[*from]));
    }

    /// [`restore`](Self::restore) for the indices [o / V, d] of vectors of V rows.
    pub(super) fn restore_indices(&self, indices: &mut [u8], vector_length: usize) {
        let part_rows = self.part_rows / vector_length;
        Natural { orders: self.orders.clone(), part_rows, ..*self }.restore(indices);
    }

    /// Converts from the order of the factors to natural order.
    pub(super) fn restore<T: Copy + Send + Sync>(&self, values: &mut [T]) {
        self.each_row(values, |new, old, order| old.iter().zip(order).for_each(|(old, to)| new[*to] = *old));
    }
}
