//! Prototype: polish by the Kronecker product of an output Hessian and the input's.

use std::collections::BTreeMap;
use std::sync::Mutex;

use rayon::prelude::*;
use squeeze_base::error::Result;
use squeeze_numerics::product::product;
use tch::Tensor;

use super::super::matrix::to_vec;
use super::polish::{BLOCK, PASSES, gradient};
use super::problem::Problem;
use super::sorted_codebook::{Entries, Palette, SortedCodebook};

pub static OUTPUTS: Mutex<BTreeMap<String, Vec<f32>>> = Mutex::new(BTreeMap::new());

pub fn env(name: &str, default: f64) -> f64 {
    std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(default)
}

/// Blocks [K, K] along the diagonal; the last may be smaller.
pub struct OutputHessian {
    pub k: usize,
    pub blocks: Vec<(usize, Vec<f32>)>,
}

impl OutputHessian {
    pub fn of(name: &str, rows: usize) -> Option<Self> {
        let whole = OUTPUTS.lock().unwrap().get(name).cloned()?;
        let o = (whole.len() as f64).sqrt() as usize;
        if o != rows {
            eprintln!("{name}: {o} {rows}");
            return None;
        }
        let k = (env("SQ_K", 128.0) as usize).min(o);
        let rho = env("SQ_RHO", 0.1) as f32;
        let mean = (0..o).map(|r| whole[r * o + r]).sum::<f32>() / o as f32;
        if !(mean > 0.0) {
            return None;
        }
        let mut blocks = vec![];
        let mut start = 0;
        while start < o {
            let n = k.min(o - start);
            let mut b = vec![0.0; n * n];
            for r in 0..n {
                for c in 0..n {
                    b[r * n + c] = whole[(start + r) * o + start + c] / mean * (1.0 - rho);
                }
                b[r * n + r] += rho;
            }
            blocks.push((n, b));
            start += n;
        }
        Some(OutputHessian { k, blocks })
    }

    /// G x for x [o, c].
    pub fn times(&self, x: &Tensor) -> Result<Tensor> {
        let mut parts = vec![];
        let mut start = 0;
        for (n, b) in &self.blocks {
            let n = *n as i64;
            let g = Tensor::f_from_slice(b)?.f_reshape([n, n])?;
            parts.push(product(&g, &x.f_narrow(0, start, n)?)?);
            start += n;
        }
        Ok(Tensor::f_cat(&parts, 0)?)
    }
}

/// tr(G D H D^T).
pub(super) fn weighted(problem: &Problem<'_>, g: &OutputHessian, weight: impl Fn(usize) -> f32 + Sync) -> Result<f64> {
    let data = &problem.data;
    let mut changes = vec![];
    let mut products = vec![];
    for (part, rows) in problem.chunks() {
        let part = problem.part(part);
        let change = data.change(&rows, &weight);
        products.extend(part.times(&change)?);
        changes.extend(change);
    }
    let shape = [data.rows as i64, data.columns as i64];
    let gp = to_vec(&g.times(&Tensor::f_from_slice(&products)?.f_reshape(shape)?)?)?;
    Ok(changes.iter().zip(&gp).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum())
}

pub(super) fn polish_outputs(problem: &Problem<'_>, sorted: &mut SortedCodebook, g: &OutputHessian) -> Result<usize> {
    let data = &problem.data;
    let d = data.columns;
    let mut changed = 0;
    assert!(problem.factors.parts.len() == 1);
    let part = problem.part(0);
    let rows = 0..data.rows;
    let count = rows.len() as i64;
    let change = data.change(&rows, |at| if data.kept(at) { sorted.value(at, d) } else { 0.0 });
    let change = Tensor::f_from_slice(&change)?.f_reshape([count, d as i64])?;
    for panel in 0..part.h.count() {
        let mut start = part.h.rows(panel).start;
        while start < part.h.rows(panel).end {
            let end = part.h.rows(panel).end.min(start + BLOCK);
            let (grad, corner) = gradient(&part.h, &change, panel, start, end)?;
            let mut grad = to_vec(&g.times(&grad)?)?;
            let corner = to_vec(&corner)?;
            let width = (end - start) as usize;
            let diagonal = &part.diagonal[start as usize..end as usize];
            let v = sorted.vector_length;
            let mut moved = vec![0.0; grad.len()];
            let mut indices = std::mem::take(&mut sorted.indices);
            let k = g.k;
            let numbers: usize = {
                let sorted = &*sorted;
                grad.par_chunks_mut(width * k)
                    .zip(moved.par_chunks_mut(width * k))
                    .zip(indices.par_chunks_mut(d * k / v))
                    .zip(&g.blocks)
                    .enumerate()
                    .map(|(b, (((grad, moved), indices), (n, g)))| {
                        let row = b * k;
                        let mut number = 0;
                        for _ in 0..PASSES {
                            let before = number;
                            for j in 0..width {
                                if diagonal[j] <= 0.0 {
                                    continue;
                                }
                                for t in 0..n / v {
                                    let at = (row + t * v) * d + start as usize + j;
                                    if !data.kept(at) {
                                        continue;
                                    }
                                    let index = &mut indices[t * d + start as usize + j];
                                    let step = match sorted.of_row(row + t * v) {
                                        Palette::Scalars(p) => best::<1>(&p, sorted.entries, index, grad, g, *n, t, j, width, diagonal[j]).map(|s| s.to_vec()),
                                        Palette::Pairs(p) => best::<2>(p, sorted.entries, index, grad, g, *n, t, j, width, diagonal[j]).map(|s| s.to_vec()),
                                        Palette::Fours(p) => best::<4>(p, sorted.entries, index, grad, g, *n, t, j, width, diagonal[j]).map(|s| s.to_vec()),
                                    };
                                    let Some(step) = step else { continue };
                                    number += v;
                                    for m in 0..v {
                                        moved[(t * v + m) * width + j] += step[m];
                                    }
                                    let h = &corner[j * width..(j + 1) * width];
                                    for r in 0..*n {
                                        let c: f32 = (0..v).map(|m| g[r * n + t * v + m] * step[m]).sum();
                                        for (gr, h) in grad[r * width..(r + 1) * width].iter_mut().zip(h) {
                                            *gr += c * h;
                                        }
                                    }
                                }
                            }
                            if number == before {
                                break;
                            }
                        }
                        number
                    })
                    .sum()
            };
            sorted.indices = indices;
            if numbers > 0 {
                changed += numbers;
                let moved = Tensor::f_from_slice(&moved)?.f_reshape([count, end - start])?;
                let _ = change.f_narrow(1, start, end - start)?.f_add_(&moved)?;
            }
            start = end;
        }
    }
    Ok(changed)
}

#[allow(clippy::too_many_arguments)]
fn best<const V: usize>(
    p: &impl Entries<V>,
    entries: usize,
    index: &mut u8,
    grad: &[f32],
    g: &[f32],
    n: usize,
    t: usize,
    j: usize,
    width: usize,
    h: f32,
) -> Option<[f32; V]> {
    let now = p.entry(*index);
    let slope: [f32; V] = std::array::from_fn(|m| grad[(t * V + m) * width + j]);
    let a: [[f32; V]; V] = std::array::from_fn(|m| std::array::from_fn(|q| g[(t * V + m) * n + t * V + q] * h));
    let cost = |s: &[f32; V]| -> f32 {
        let mut c = 0.0;
        for m in 0..V {
            let mut x = 2.0 * slope[m];
            for q in 0..V {
                x += a[m][q] * s[q];
            }
            c += s[m] * x;
        }
        c
    };
    let mut least = 0.0;
    let mut found = None;
    for e in 0..entries {
        let entry = p.entry(e as u8);
        let s: [f32; V] = std::array::from_fn(|m| entry[m] - now[m]);
        let c = cost(&s);
        if c < least {
            least = c;
            found = Some((e as u8, s));
        }
    }
    let (e, s) = found?;
    let floor: f32 = (0..V).map(|m| 1e-5 * s[m] * s[m] * a[m][m]).sum();
    if -least <= floor {
        return None;
    }
    *index = e;
    Some(s)
}
