//! Every operation of a forward gives the same bits on any number of threads.

use squeeze_numerics::elementwise::silu;
use squeeze_numerics::product::linear;
use squeeze_numerics::random::noise;
use tch::{Kind, Tensor};

use super::network::{attend, split_heads};

fn numbers(size: &[i64], seed: u64) -> Tensor {
    noise(size, seed, Kind::Float).unwrap()
}

/// Runs `operation` on 1, 2, 3 and 7 threads, of libtorch and of rayon.
fn alike(name: &str, operation: &dyn Fn() -> Tensor) {
    let before = tch::get_num_threads();
    let on = |threads: usize| {
        tch::set_num_threads(threads as i32);
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        // The operation runs on this thread, since tensors are not `Sync`; only faer uses the pool.
        let mut result = None;
        pool.in_place_scope(|_| result = Some(operation()));
        result.unwrap()
    };
    let one = on(1);
    for threads in [2, 3, 7] {
        assert!(on(threads) == one, "{name}: other bits on {threads} threads than on one");
    }
    tch::set_num_threads(before);
}

#[test]
fn convolutions_have_the_same_bits_on_any_number_of_threads() {
    for (batch, from, side, to, stride) in [
        (2, 4, 64, 320, 1),
        (2, 320, 32, 320, 1),
        (2, 320, 32, 4, 1),
        (1, 64, 33, 96, 2),
        (2, 32, 16, 64, 1),
        (2, 640, 8, 1280, 1),
        (2, 96, 9, 33, 1),
    ] {
        let (x, w, b) = (numbers(&[batch, from, side, side], 1), numbers(&[to, from, 3, 3], 2), numbers(&[to], 3));
        alike(&format!("convolution {from} to {to} of {side}"), &|| x.conv2d(&w, Some(&b), [stride; 2], [1, 1], [1, 1], 1));
    }
}

#[test]
fn attention_has_the_same_bits_on_any_number_of_threads() {
    for (batch, queries, keys, heads) in [(2, 1024, 1024, 5), (2, 256, 77, 10), (1, 77, 77, 12), (2, 100, 36, 4), (2, 4, 77, 2)] {
        let [q, k, v] = [(queries, 1), (keys, 2), (keys, 3)].map(|(length, seed)| numbers(&[batch, length, heads * 64], seed));
        let split = |states: &Tensor| split_heads(states, heads).unwrap();
        alike(&format!("attention {queries} to {keys}"), &|| {
            attend(&split(&q), &split(&k), &split(&v), queries == keys).unwrap()
        });
    }
}

#[test]
fn norms_and_activations() {
    for size in [[2, 320, 33, 31], [2, 64, 16, 16], [1, 1280, 8, 8]] {
        let (x, w, b) = (numbers(&size, 1), numbers(&[size[1]], 2), numbers(&[size[1]], 3));
        alike("group norm", &|| x.group_norm(32, Some(&w), Some(&b), 1e-5, true));
        let tokens = x.permute([0, 2, 3, 1]).reshape([size[0], size[2] * size[3], size[1]]);
        alike("layer norm", &|| tokens.layer_norm([size[1]], Some(&w), Some(&b), 1e-5, true));
        alike("SiLU", &|| silu(&x).unwrap());
        alike("GELU", &|| x.gelu("none"));
        alike("exp", &|| x.exp());
        alike("sin and cos", &|| x.sin() + x.cos());
        alike("upsampling", &|| x.upsample_nearest2d([2 * size[2], 2 * size[3]], None, None));
        alike("unfolding", &|| x.im2col([3, 3], [1, 1], [1, 1], [2, 2]));
    }
}

#[test]
fn linear_layers_of_every_dtype() {
    for (rows, d, o) in
        [(1, 2816, 1280), (1, 4096, 4096), (2, 320, 1280), (2, 1280, 320), (77, 2048, 640), (1000, 320, 1280), (8, 64, 512)]
    {
        let (x, w, b) = (numbers(&[rows, d], 1), numbers(&[o, d], 2), numbers(&[o], 3));
        for kind in [Kind::Float, Kind::Half, Kind::BFloat16] {
            let [x, w, b] = [&x, &w, &b].map(|tensor| tensor.to_kind(kind));
            alike(&format!("linear {rows} {d} {o} {kind:?}"), &|| linear(&x, &w, Some(&b)).unwrap());
        }
    }
}
