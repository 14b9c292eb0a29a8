//! The cheapest path along a line of weighted points, where each step is a cluster.
//!
//! With a price on each cluster, the cost of the best path to an end is the least of cost to a
//! begin + cost of the cluster between them, over all begins before it. By the Monge property, once
//! a later begin is better than an earlier one, it is better for all later ends. The same then
//! holds for groups of neighbouring begins, each with the cost of its best member: so groups that
//! are best for some end are kept in a queue, in the order of these ends. Members of a group are
//! compared with each other by vector instructions, without branches, which is several times as
//! fast as a queue of single begins.

use pulp::{Arch, Simd, WithSimd};

/// Begins in a group.
const GROUP: usize = 16;

/// The sums over a line's points that paths are made of.
#[derive(Debug, Default)]
pub(super) struct Sums {
    /// `[n + 1]`: the sum of weights from zero's place on the line to each point; negative below.
    pub weights: Vec<f64>,
    /// `[n + 1]`: the sum of weight * value likewise.
    pub values: Vec<f64>,
    /// The sum of weight * value^2 below zero.
    pub below: f64,
}

/// Buffers that are reused by later calls.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    /// `[n + 1]` and up to a whole number of groups: the cost of the best path to each end, less
    /// the sum of weight * value^2 from zero's place to that end; infinite where it is not known
    /// yet. All paths to an end have this term in common. Without it, a cluster adds the price and
    /// -(sum w v)^2 / (sum w).
    costs: Vec<f64>,
    /// `[n + 1]`: the group in which the last cluster of the best path to each end begins.
    groups: Vec<usize>,
    /// The sums, continued up to a whole number of groups.
    weights: Vec<f64>,
    values: Vec<f64>,
    queue: Vec<Candidate>,
}

/// A group of begins that is best for some ends.
#[derive(Debug, Clone, Copy)]
struct Candidate {
    group: usize,
    /// The first end for which it is best.
    first: usize,
}

impl Sums {
    /// The number of points.
    pub(super) fn len(&self) -> usize {
        self.weights.len() - 1
    }

    /// The sums of a line on which cuts are only allowed at every `step`-th point.
    pub(super) fn thinned(&self, step: usize) -> Sums {
        let thin = |sums: &[f64]| {
            let inner = sums[..self.len()].iter().step_by(step);
            inner.chain(&sums[self.len()..]).copied().collect()
        };
        Sums { weights: thin(&self.weights), values: thin(&self.values), below: self.below }
    }

    /// The path with the least sum of squares plus `price` a cluster, of any number of clusters:
    /// its ends, from 0 to n.
    pub(super) fn cheapest(&self, price: f64, scratch: &mut Scratch) -> Vec<usize> {
        Arch::new().dispatch(Search { sums: self, price, scratch: &mut *scratch });
        let mut ends = vec![self.len()];
        let mut end = self.len();
        while end > 0 {
            end = scratch.begin(end);
            ends.push(end);
        }
        ends.reverse();
        ends
    }
}

/// A search for the best path to every end.
struct Search<'a> {
    sums: &'a Sums,
    price: f64,
    scratch: &'a mut Scratch,
}

impl WithSimd for Search<'_> {
    type Output = ();

    // Everything below is inlined here, to be compiled for the vectors of `S`. Its results are the
    // same for all of them: no sum is reordered, and no product fused with a sum.
    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Search { sums, price, scratch } = self;
        let n = sums.len();
        scratch.prepare(sums);
        let mut front = 0;
        for group in 0..=n / GROUP {
            let (begin, after) = (group * GROUP, (group + 1) * GROUP);
            let ends = begin.max(1)..after.min(n + 1);
            // Clusters are rarely shorter than a group: so at first none of them begins in the
            // group of its end.
            let last = after > n;
            if group > 0 && !last {
                let before = front;
                for end in ends.clone() {
                    scratch.settle(simd, end, &mut front, None, price);
                }
                // If one should, it should for the end behind the group too.
                if !scratch.better(simd, group, scratch.best_at(front, after), after) {
                    scratch.insert(simd, group, n);
                    continue;
                }
                front = before;
                scratch.costs[ends.clone()].fill(f64::INFINITY);
            }
            for end in ends {
                scratch.settle(simd, end, &mut front, Some(group), price);
            }
            if !last {
                scratch.insert(simd, group, n);
            }
        }
    }
}

impl Scratch {
    #[inline(always)]
    fn prepare(&mut self, sums: &Sums) {
        let n = sums.len();
        let padded = (n + 1).next_multiple_of(GROUP);
        for (copy, sums) in [(&mut self.weights, &sums.weights), (&mut self.values, &sums.values)] {
            copy.clear();
            copy.extend_from_slice(sums);
            copy.resize(padded, sums[n]);
        }
        self.costs.clear();
        self.costs.resize(padded, f64::INFINITY);
        self.costs[0] = sums.below;
        self.groups.clear();
        self.groups.resize(n + 1, 0);
        self.queue.clear();
    }

    /// The least cost, without price, of paths to `end` whose last cluster begins at a member of a
    /// group; infinite if no member is before `end`.
    #[inline(always)]
    fn cost_from<S: Simd>(&self, simd: S, group: usize, end: usize) -> f64 {
        let members = group * GROUP..(group + 1) * GROUP;
        let [weights, values, costs] =
            [&self.weights, &self.values, &self.costs].map(|all| S::as_simd_f64s(&all[members.clone()]).0);
        let (weight, value) = (simd.splat_f64s(self.weights[end]), simd.splat_f64s(self.values[end]));
        let zero = simd.splat_f64s(0.0);
        let mut least = simd.splat_f64s(f64::INFINITY);
        for ((begin_weight, begin_value), cost) in weights.iter().zip(values).zip(costs) {
            let (weight, value) = (simd.sub_f64s(weight, *begin_weight), simd.sub_f64s(value, *begin_value));
            let saved = simd.div_f64s(simd.mul_f64s(value, value), weight);
            // The weights of points may be so small that rounding removes them from the sums.
            let saved = simd.select_f64s(simd.less_than_f64s(zero, weight), saved, zero);
            least = simd.min_f64s(least, simd.sub_f64s(*cost, saved));
        }
        simd.reduce_min_f64s(least)
    }

    /// The begin of the last cluster of the best path to a settled end.
    fn begin(&self, end: usize) -> usize {
        let members = self.groups[end] * GROUP..(self.groups[end] + 1) * GROUP;
        let cost = |begin: usize| {
            let (weight, value) = (self.weights[end] - self.weights[begin], self.values[end] - self.values[begin]);
            self.costs[begin] - if weight > 0.0 { value * value / weight } else { 0.0 }
        };
        let before = members.filter(|begin| *begin < end).map(|begin| (cost(begin), begin));
        before.min_by(|a, b| a.0.total_cmp(&b.0)).expect("the group has a member before the end").1
    }

    /// Whether the best path to `end` begins its last cluster in `group` rather than in `rival`.
    #[inline(always)]
    fn better<S: Simd>(&self, simd: S, group: usize, rival: usize, end: usize) -> bool {
        self.cost_from(simd, group, end) < self.cost_from(simd, rival, end)
    }

    /// The group of the queue that is best for `end`, from place `front` on.
    #[inline(always)]
    fn best_at(&self, mut front: usize, end: usize) -> usize {
        while self.queue.get(front + 1).is_some_and(|next| next.first <= end) {
            front += 1;
        }
        self.queue[front].group
    }

    /// Finds the cost of the best path to `end`, and its last begin: in the queue, or in `own`, the
    /// group of `end` itself.
    #[inline(always)]
    fn settle<S: Simd>(&mut self, simd: S, end: usize, front: &mut usize, own: Option<usize>, price: f64) {
        while self.queue.get(*front + 1).is_some_and(|next| next.first <= end) {
            *front += 1;
        }
        let mut best = (f64::INFINITY, 0);
        for group in self.queue.get(*front).map(|candidate| candidate.group).into_iter().chain(own) {
            let cost = self.cost_from(simd, group, end);
            if cost < best.0 {
                best = (cost, group);
            }
        }
        self.costs[end] = best.0 + price;
        self.groups[end] = best.1;
    }

    /// The first end in (from, last] for which `group` is better than `rival`, which it is then for
    /// all later ends. The search begins at `guess`, which lies after `from`.
    #[inline(always)]
    fn first_better<S: Simd>(
        &self,
        simd: S,
        [group, rival]: [usize; 2],
        from: usize,
        last: usize,
        guess: usize,
    ) -> Option<usize> {
        if from >= last {
            return None;
        }
        let guess = guess.min(last);
        let (mut no, mut yes, mut step) = (from, last + 1, 2);
        // One of the two ends is moved to the guess, and then away from it until the other is met.
        if self.better(simd, group, rival, guess) {
            yes = guess;
            while yes - no > 1 {
                let at = yes.saturating_sub(step).max(no + 1);
                step *= 2;
                if self.better(simd, group, rival, at) {
                    yes = at;
                } else {
                    no = at;
                    break;
                }
            }
        } else {
            no = guess;
            while no < last {
                let at = (no + step).min(last);
                step *= 2;
                if self.better(simd, group, rival, at) {
                    yes = at;
                    break;
                }
                no = at;
            }
            if no == last {
                return None;
            }
        }
        while yes - no > 1 {
            let middle = no + (yes - no) / 2;
            if self.better(simd, group, rival, middle) { yes = middle } else { no = middle }
        }
        Some(yes)
    }

    /// Adds a group, all of whose costs are known, to the queue of a line of `n` points.
    #[inline(always)]
    fn insert<S: Simd>(&mut self, simd: S, group: usize, n: usize) {
        let from = (group + 1) * GROUP;
        if from > n {
            return;
        }
        loop {
            let Some(&Candidate { group: rival, first }) = self.queue.last() else {
                return self.queue.push(Candidate { group, first: 1 });
            };
            let begin = first.max(from);
            if !self.better(simd, group, rival, begin) {
                // The distance between the first ends of the last two groups is a good guess.
                let before = self.queue.len().checked_sub(2).map_or(0, |at| self.queue[at].first);
                let guess = begin + (first - before).clamp(1, 4 * GROUP);
                let first = self.first_better(simd, [group, rival], begin, n, guess);
                return self.queue.extend(first.map(|first| Candidate { group, first }));
            }
            if first < from {
                // The rival is in use for ends that are settled.
                return self.queue.push(Candidate { group, first: from });
            }
            self.queue.pop();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The least cost of a path to each end, over all begins.
    fn least(sums: &Sums, price: f64) -> Vec<f64> {
        let mut costs = vec![sums.below];
        for end in 1..=sums.len() {
            let cost = |begin: usize| {
                let (weight, value) = (sums.weights[end] - sums.weights[begin], sums.values[end] - sums.values[begin]);
                costs[begin] - value * value / weight + price
            };
            costs.push((0..end).map(cost).fold(f64::INFINITY, f64::min));
        }
        costs
    }

    /// Clusters shorter and longer than a group of begins, and lines whose ends lie anywhere in a
    /// group.
    #[test]
    fn no_begin_is_overlooked() {
        let mut scratch = Scratch::default();
        for n in [1, 2, 15, 16, 17, 31, 32, 33, 700, 701] {
            let point = |at: usize| (at as f64 - 20.0 + (at * at % 7) as f64 / 10.0, 1.0 + (at * 31 % 11) as f64);
            let mut sums = Sums { weights: vec![0.0], values: vec![0.0], below: 3.0 };
            for (value, weight) in (0..n).map(point) {
                sums.weights.push(sums.weights[sums.weights.len() - 1] + weight);
                sums.values.push(sums.values[sums.values.len() - 1] + value * weight);
            }
            for price in [1e-3, 1.0, 30.0, 1e3, 1e4, 1e5, 1e6, 1e7, 1e9] {
                let ends = sums.cheapest(price, &mut scratch);
                assert!(ends[0] == 0 && ends[ends.len() - 1] == n && ends.is_sorted_by(|a, b| a < b), "{ends:?}");
                let expected = least(&sums, price);
                let scale = expected.iter().fold(price, |scale, cost| cost.abs().max(scale));
                for (end, (ours, expected)) in scratch.costs.iter().zip(&expected).enumerate() {
                    assert!((ours - expected).abs() <= 1e-12 * scale, "{n} {price} {end}: {ours}, not {expected}");
                }
            }
        }
    }
}
