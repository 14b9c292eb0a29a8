//! A histogram of fp16 values, and the lookup of their nearest palette entries.

use half::f16;

use super::values::Bucket;

/// The number of all fp16 values, infinities and NaN included.
const KEYS: usize = 1 << 16;

/// The rank of a value among all fp16 values in ascending order; that of -0 is one below that of 0.
fn key(value: f16) -> u16 {
    let bits = value.to_bits();
    // All bits of negative values are turned over, and the sign of others.
    bits ^ ((bits.cast_signed() >> 15).cast_unsigned() | 0x8000)
}

/// The key of -0.
const NEGATIVE_ZERO: usize = 0x7fff;
/// The key of 0.
const ZERO: usize = 0x8000;

fn value(key: u16) -> f16 {
    f16::from_bits(if key & 0x8000 != 0 { key & 0x7fff } else { !key })
}

/// The weight of each fp16 value. The memory is reused for the next group, and only the range in
/// use is cleared.
#[derive(Debug)]
pub(super) struct Histogram {
    /// The weight of each key.
    weights: Vec<f64>,
    /// The smallest and the largest key with a weight.
    range: Option<(u16, u16)>,
}

impl Histogram {
    pub(super) fn new() -> Self {
        Histogram { weights: vec![0.0; KEYS], range: None }
    }

    /// Adds `weight` to a value. It must not be negative; 0 has no effect.
    pub(super) fn add(&mut self, value: f16, weight: f64) {
        let key = if value == f16::ZERO { ZERO as u16 } else { key(value) };
        let (low, high) = self.range.unwrap_or((key, key));
        self.range = Some((low.min(key), high.max(key)));
        self.weights[usize::from(key)] += weight;
    }

    /// Moves the values with a weight into `buckets`, ascending, and clears the histogram.
    pub(super) fn drain(&mut self, buckets: &mut Vec<Bucket>) {
        buckets.clear();
        let Some((low, high)) = self.range.take() else { return };
        let slots = &mut self.weights[usize::from(low)..=usize::from(high)];
        for (key, slot) in (low..=high).zip(slots) {
            if *slot > 0.0 {
                buckets.push(Bucket { value: value(key), weight: *slot });
                *slot = 0.0;
            }
        }
    }
}

/// The number of times that each fp16 value occurs. The memory is reused as that of [`Histogram`].
#[derive(Debug, Clone)]
pub(super) struct Counts {
    /// The count of each value, by its bits.
    counts: Vec<u32>,
    /// The bits of the largest magnitude that was looked at.
    largest: u16,
}

impl Counts {
    pub(super) fn new() -> Self {
        Counts { counts: vec![0; KEYS], largest: 0 }
    }

    /// Counts the values that `keep` has true for; `None` keeps all.
    pub(super) fn add(&mut self, values: &[f16], keep: Option<&[bool]>) {
        let largest = values.iter().fold(0, |largest, value| (value.to_bits() & 0x7fff).max(largest));
        self.largest = self.largest.max(largest);
        // A slice of known length, so that no index is checked.
        let counts: &mut [u32; KEYS] = self.counts.as_mut_slice().try_into().expect("there is a count for every key");
        match keep {
            None => values.iter().for_each(|value| counts[usize::from(value.to_bits())] += 1),
            // Masks are so irregular that an addition of 0 is faster than a branch.
            Some(keep) => {
                values.iter().zip(keep).for_each(|(value, keep)| counts[usize::from(value.to_bits())] += u32::from(*keep));
            }
        }
    }

    /// Adds the counts of `others`.
    pub(super) fn merge(&mut self, others: &Counts) {
        self.largest = self.largest.max(others.largest);
        self.counts.iter_mut().zip(&others.counts).for_each(|(count, other)| *count += other);
    }

    /// Moves the values that occur into `buckets`, ascending, and clears the counts.
    pub(super) fn drain(&mut self, buckets: &mut Vec<Bucket>) {
        let top = usize::from(self.largest);
        self.largest = 0;
        self.counts[0] += std::mem::take(&mut self.counts[0x8000]);
        buckets.clear();
        buckets.resize(2 * top + 1, Bucket { value: f16::ZERO, weight: 0.0 });
        let (negative, positive) = (0x8001..0x8001 + top, 0..top + 1);
        let mut length = 0;
        for bits in negative.rev().chain(positive) {
            let count = std::mem::take(&mut self.counts[bits]);
            // Every slot is written, and kept if it is not empty: a branch would rarely be
            // predicted.
            buckets[length] = Bucket { value: f16::from_bits(bits as u16), weight: f64::from(count) };
            length += usize::from(count > 0);
        }
        buckets.truncate(length);
    }
}

/// The nearest palette entry of every fp16 value; the lower of two equally near entries.
#[derive(Debug)]
pub(super) struct Nearest {
    /// The palette entry of each key.
    entries: Vec<u8>,
}

impl Nearest {
    pub(super) fn new() -> Self {
        Nearest { entries: vec![0; KEYS] }
    }

    /// Sets the palette, which must be strictly ascending, with at most 256 entries.
    pub(super) fn set(&mut self, palette: &[f16]) {
        let mut begin = 0;
        for (entry, (&this, next)) in (0_u8..=u8::MAX).zip(palette.iter().zip(palette.iter().skip(1).map(Some).chain([None]))) {
            let end = next.map_or(KEYS, |&next| first_nearer_to(next, this));
            self.entries[begin..end].fill(entry);
            begin = end;
        }
        self.entries[NEGATIVE_ZERO] = self.entries[ZERO];
    }

    /// The entry for a value.
    pub(super) fn entry(&self, value: f16) -> u8 {
        self.entries[usize::from(key(value))]
    }

    /// Writes the entries for `values` to `entries`; 0 where `keep` is false.
    pub(super) fn write(&self, values: &[f16], keep: Option<&[bool]>, entries: &mut [u8]) {
        // A slice of known length, so that no index is checked.
        let table: &[u8; KEYS] = self.entries.as_slice().try_into().expect("there is an entry for every key");
        let entry = |value: f16| table[usize::from(key(value))];
        match keep {
            None => entries.iter_mut().zip(values).for_each(|(to, value)| *to = entry(*value)),
            Some(keep) => {
                let all = entries.iter_mut().zip(values).zip(keep);
                all.for_each(|((to, value), keep)| *to = entry(*value) * u8::from(*keep));
            }
        }
    }
}

/// The key of the first value that is nearer to `upper` than to `lower`.
fn first_nearer_to(upper: f16, lower: f16) -> usize {
    // This is exact: a sum of two fp16 values has at most 42 binary digits.
    let middle = (lower.to_f64() + upper.to_f64()) / 2.0;
    let (mut no, mut yes) = (key(lower), key(upper));
    while yes - no > 1 {
        let between = no + (yes - no) / 2;
        if value(between).to_f64() > middle { yes = between } else { no = between }
    }
    usize::from(yes)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn keys_are_in_the_order_of_values() {
        let mut last = f64::NEG_INFINITY;
        for bits in (0x8001..=0xfbff_u16).rev().chain(0..=0x7bff) {
            let number = f16::from_bits(bits);
            assert!(number.to_f64() > last);
            last = number.to_f64();
            assert_eq!(value(key(number)), number);
        }
        assert_eq!((usize::from(key(f16::NEG_ZERO)), usize::from(key(f16::ZERO))), (NEGATIVE_ZERO, ZERO));
        let mut nearest = Nearest::new();
        nearest.set(&[f16::from_f32(-1.0), f16::ZERO]);
        assert_eq!(nearest.entry(f16::NEG_ZERO), 1);
    }

    #[test]
    fn values_come_out_once_in_order_and_are_forgotten() {
        let mut histogram = Histogram::new();
        let mut buckets = Vec::new();
        histogram.drain(&mut buckets);
        assert!(buckets.is_empty());
        for number in [1.0, -0.0, -2.0, 0.0, 1.0] {
            histogram.add(f16::from_f32(number), 0.5);
        }
        histogram.add(f16::from_f32(3.0), 0.0);
        histogram.drain(&mut buckets);
        let seen: Vec<_> = buckets.iter().map(|bucket| (bucket.value.to_f32(), bucket.weight)).collect();
        assert_eq!(seen, [(-2.0, 0.5), (0.0, 1.0), (1.0, 1.0)]);
        histogram.drain(&mut buckets);
        assert!(buckets.is_empty());
    }

    #[test]
    fn counts_are_those_of_the_histogram() {
        let values: Vec<f16> = (0..5000_u32).map(|i| f16::from_bits((i * i % 977 * 31 + (i % 3) * 0x4000) as u16)).collect();
        let finite: Vec<f16> = values.into_iter().filter(|value| value.is_finite()).chain([f16::NEG_ZERO]).collect();
        let kept: Vec<bool> = (0..finite.len()).map(|i| i % 7 < 4).collect();
        let (mut counts, mut others, mut histogram) = (Counts::new(), Counts::new(), Histogram::new());
        for keep in [None, Some(kept.as_slice())] {
            finite.iter().enumerate().filter(|(at, _)| keep.is_none_or(|keep| keep[*at])).for_each(|(_, value)| {
                histogram.add(*value, 1.0);
            });
            let (first, rest) = finite.split_at(700);
            counts.add(first, keep.map(|keep| &keep[..700]));
            others.add(rest, keep.map(|keep| &keep[700..]));
            counts.merge(&others);
            others = Counts::new();
            let (mut ours, mut expected) = (Vec::new(), Vec::new());
            counts.drain(&mut ours);
            histogram.drain(&mut expected);
            assert_eq!(ours, expected);
        }
        let mut none = vec![Bucket { value: f16::ONE, weight: 1.0 }];
        counts.drain(&mut none);
        assert!(none.is_empty());
    }

    proptest! {
        #[test]
        fn the_nearest_entry_is_the_nearest(
            bits in prop::collection::btree_set(0_u16..0x7c00, 1..20),
            negative in any::<u32>(),
            looked_up in prop::collection::vec((0_u16..0x7c00, any::<bool>()), 100),
        ) {
            let signed = |bits: u16, negative: bool| f16::from_bits(bits | if negative && bits != 0 { 0x8000 } else { 0 });
            let mut palette: Vec<_> = bits.into_iter().enumerate().map(|(at, bits)| signed(bits, negative >> at & 1 == 1)).collect();
            palette.sort_by(f16::total_cmp);
            let mut nearest = Nearest::new();
            nearest.set(&palette);
            let middles = palette.windows(2).map(|pair| f16::from_f64((pair[0].to_f64() + pair[1].to_f64()) / 2.0));
            let others = looked_up.into_iter().map(|(bits, negative)| signed(bits, negative));
            for number in middles.chain(others).collect::<Vec<_>>() {
                let distance = |entry: &f16| (entry.to_f64() - number.to_f64()).abs();
                // `min_by` takes the first of equals.
                let best = palette.iter().enumerate().min_by(|a, b| distance(a.1).total_cmp(&distance(b.1))).unwrap().0;
                prop_assert_eq!(usize::from(nearest.entry(number)), best);
            }
        }
    }
}
