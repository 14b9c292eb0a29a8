//! numpy's `SeedSequence`: independent seeds for the nodes of a tree, from one number and a path.

/// The words of the pool that torchsde's trees ask for (`pool_size`).
const POOL: usize = 24;

/// The first `N` numbers of `numpy.random.SeedSequence(entropy, spawn_key=path,
/// pool_size=24).generate_state(N)`.
///
/// The hash is that of O'Neill's `seed_seq_fe`, with a pool of another size.
pub(crate) fn state<const N: usize>(entropy: u64, path: &[u128]) -> [u32; N] {
    const INITIAL: u32 = 0x8b51_f9dd;
    const FACTOR: u32 = 0x58f3_8ded;
    let pool = pool(entropy, path);
    let mut constant = INITIAL;
    std::array::from_fn(|index| {
        let mut word = pool[index % POOL] ^ constant;
        constant = constant.wrapping_mul(FACTOR);
        word = word.wrapping_mul(constant);
        word ^ (word >> 16)
    })
}

/// The entropy and the path, mixed into the words of the pool.
fn pool(entropy: u64, path: &[u128]) -> [u32; POOL] {
    let mut given = words(u128::from(entropy));
    if !path.is_empty() {
        // So that no entropy is mistaken for the beginning of a path.
        given.resize(given.len().max(POOL), 0);
    }
    given.extend(path.iter().flat_map(|number| words(*number)));
    let mut hash = Hash(0x43b0_d7e5);
    let mut pool: [u32; POOL] = std::array::from_fn(|index| hash.of(given.get(index).copied().unwrap_or(0)));
    for from in 0..POOL {
        for to in 0..POOL {
            if from != to {
                pool[to] = mixed(pool[to], hash.of(pool[from]));
            }
        }
    }
    for word in given.iter().skip(POOL) {
        for to in &mut pool {
            *to = mixed(*to, hash.of(*word));
        }
    }
    pool
}

/// The 32-bit words of a number, least significant first; at least one.
fn words(mut number: u128) -> Vec<u32> {
    let mut words = vec![number as u32];
    number >>= 32;
    while number > 0 {
        words.push(number as u32);
        number >>= 32;
    }
    words
}

/// A multiplicative hash whose constant changes with each word.
struct Hash(u32);

impl Hash {
    fn of(&mut self, word: u32) -> u32 {
        let word = word ^ self.0;
        self.0 = self.0.wrapping_mul(0x931e_8875);
        let word = word.wrapping_mul(self.0);
        word ^ (word >> 16)
    }
}

fn mixed(x: u32, y: u32) -> u32 {
    let word = x.wrapping_mul(0xca01_f9dd).wrapping_sub(y.wrapping_mul(0x4973_f715));
    word ^ (word >> 16)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The values are those of numpy 2.3.
    #[test]
    fn states_equal_those_of_numpy() {
        assert_eq!(state::<3>(7, &[]), [1_376_543_887, 623_213_690, 436_845_524]);
        assert_eq!(state::<4>(0, &[0, 0]), [245_430_115, 3_436_620_678, 4_120_055_464, 1_627_243_804]);
        assert_eq!(state::<4>(1 << 40, &[5, 9]), [402_932_101, 3_093_426_798, 1_834_042_831, 3_714_977_461]);
        assert_eq!(state::<4>(u64::MAX, &[1 << 70, 70]), [110_338_901, 1_332_812_658, 2_041_425_990, 1_042_449_362]);
    }
}
