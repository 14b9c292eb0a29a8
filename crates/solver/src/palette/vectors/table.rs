//! The search for the nearest of a palette's vectors.

/// Vectors whose distances are computed side by side.
const LANES: usize = 16;

/// The vectors of a palette, at most 256, laid out for the search of the nearest one.
#[derive(Debug, Clone, Default)]
pub(crate) struct VectorTable<const V: usize> {
    blocks: Vec<Block<V>>,
}

/// [`LANES`] neighbouring vectors. After the last vector, those of infinite norm are never nearest.
#[derive(Debug, Clone)]
struct Block<const V: usize> {
    /// The first values of all vectors, the second ones, and so on.
    members: [[f32; LANES]; V],
    /// ‖c‖² / 2.
    halves: [f32; LANES],
}

impl<const V: usize> VectorTable<V> {
    /// The table of these vectors, in this order.
    pub(crate) fn new(vectors: &[[f32; V]]) -> Self {
        let mut table = VectorTable::default();
        for vectors in vectors.chunks(LANES) {
            let mut block = Block { members: [[0.0; LANES]; V], halves: [f32::INFINITY; LANES] };
            for (lane, vector) in vectors.iter().enumerate() {
                (0..V).for_each(|member| block.members[member][lane] = vector[member]);
                block.halves[lane] = vector.iter().map(|value| value * value).sum::<f32>() / 2.0;
            }
            table.blocks.push(block);
        }
        table
    }

    /// The vector of this index.
    #[inline(always)]
    pub(crate) fn vector(&self, index: u8) -> [f32; V] {
        let (block, lane) = (usize::from(index) / LANES, usize::from(index) % LANES);
        std::array::from_fn(|member| self.blocks[block].members[member][lane])
    }

    /// The index of the vector nearest to `x` by Euclidean distance; the lowest of equally near
    /// ones.
    ///
    /// The nearest c has the least ‖c‖² / 2 - c x. Each lane keeps its own best, so that the loops
    /// become SIMD instructions; their results are the same with any of them.
    #[inline(always)]
    pub(crate) fn nearest(&self, x: [f32; V]) -> u8 {
        self.first_of_least(|block| {
            let mut scores = block.halves;
            for (members, x) in block.members.iter().zip(x) {
                for lane in 0..LANES {
                    scores[lane] -= members[lane] * x;
                }
            }
            scores
        })
    }

    /// The index of the vector c of least c A c + 2 c b; the lowest of equally good ones.
    #[inline(always)]
    pub(crate) fn least(&self, a: &[[f32; V]; V], b: &[f32; V]) -> u8 {
        self.first_of_least(|block| {
            // Those after the last vector stay infinite.
            let mut scores = block.halves.map(|half| if half == f32::INFINITY { half } else { 0.0 });
            for (row, (a, b)) in a.iter().zip(b).enumerate() {
                let mut bent = [2.0 * b; LANES];
                for (members, a) in block.members.iter().zip(a) {
                    for lane in 0..LANES {
                        bent[lane] += members[lane] * a;
                    }
                }
                for lane in 0..LANES {
                    scores[lane] += block.members[row][lane] * bent[lane];
                }
            }
            scores
        })
    }

    /// The index of the vector of least score; the lowest of equal ones.
    #[inline(always)]
    fn first_of_least(&self, scores: impl Fn(&Block<V>) -> [f32; LANES]) -> u8 {
        let mut least = [f32::INFINITY; LANES];
        let mut place = [0_u32; LANES];
        for (number, block) in (0_u32..).zip(&self.blocks) {
            let scores = scores(block);
            for lane in 0..LANES {
                let is_less = scores[lane] < least[lane];
                least[lane] = if is_less { scores[lane] } else { least[lane] };
                place[lane] = if is_less { number } else { place[lane] };
            }
        }
        let (mut best, mut index) = (f32::INFINITY, 0);
        for lane in 0..LANES {
            let here = place[lane] as usize * LANES + lane;
            if least[lane] < best || (least[lane] == best && here < index) {
                (best, index) = (least[lane], here);
            }
        }
        // A palette has at most 256 vectors.
        index as u8
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn by_definition<const V: usize>(vectors: &[[f32; V]], x: [f32; V]) -> f32 {
        let distance = |vector: &[f32; V]| vector.iter().zip(x).map(|(c, x)| (c - x) * (c - x)).sum::<f32>();
        vectors.iter().map(distance).fold(f32::INFINITY, f32::min)
    }

    fn is_nearest<const V: usize>(vectors: &[[f32; V]], x: [f32; V]) {
        let table = VectorTable::new(vectors);
        let found = table.vector(table.nearest(x));
        let distance = found.iter().zip(x).map(|(c, x)| (c - x) * (c - x)).sum::<f32>();
        assert!(distance <= by_definition(vectors, x) + 1e-5, "{found:?} for {x:?} at {distance}");
    }

    proptest! {
        #[test]
        fn the_nearest_is_found(
            pairs in prop::collection::vec(prop::array::uniform2(-1f32..1.0), 1..257),
            fours in prop::collection::vec(prop::array::uniform4(-1f32..1.0), 1..257),
            x in prop::array::uniform4(-2f32..2.0),
        ) {
            is_nearest(&pairs, [x[0], x[1]]);
            is_nearest(&fours, x);
        }

        #[test]
        fn the_least_of_a_parabola_is_found(
            pairs in prop::collection::vec(prop::array::uniform2(-1f32..1.0), 1..257),
            (p, q, r) in (0.1f32..2.0, -0.9f32..0.9, 0.1f32..2.0),
            b in prop::array::uniform2(-2f32..2.0),
        ) {
            let cross = q * (p * r).sqrt();
            let a = [[p, cross], [cross, r]];
            let value = |c: &[f32; 2]| {
                (0..2).map(|i| c[i] * (2.0 * b[i] + (0..2).map(|j| a[i][j] * c[j]).sum::<f32>())).sum::<f32>()
            };
            let table = VectorTable::new(&pairs);
            let found = table.vector(table.least(&a, &b));
            let best = pairs.iter().map(value).fold(f32::INFINITY, f32::min);
            prop_assert!(value(&found) <= best + 1e-4, "{found:?}");
        }
    }

    #[test]
    fn of_equal_vectors_the_first_is_taken() {
        let mut vectors = vec![[1.0, 1.0]; 40];
        vectors[5] = [0.0, 0.5];
        vectors[20] = [0.0, 0.5];
        let table = VectorTable::new(&vectors);
        assert_eq!((table.nearest([0.1, 0.5]), table.nearest([2.0, 2.0])), (5, 0));
        assert_eq!(table.vector(20), [0.0, 0.5]);
    }
}
